"""Coverage-guided fuzzing of the reader of a receiver's job, with atheris.

    pip install -e ".[fuzz]"
    python -m tests.faults.fuzz_reader [CORPUS_DIRECTORY] [-runs=200000] [-max_total_time=120] ...

Further arguments are libFuzzer's. Without a corpus it begins with seeds of its own. It ends at the
first input that is accepted though it is not what was written, or that raises anything but a
``PayloadError``; libFuzzer then leaves the input in the present directory as ``crash-...``.

Digests stop a mutation at the door. So the first byte of an input says what the rest of it is: the
whole file, or one part of a file whose digests are then made to fit it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save

try:
    import atheris
except ImportError:
    atheris = None

with (
    atheris.instrument_imports(["toolkit.bridge", "safetensors.torch"])
    if atheris
    else (contextlib.nullcontext())
):
    from safetensors.torch import load

    from tests.faults.mutants import CHANGES, mutant
    from tests.faults.originals import (
        EXPECTED,
        JOB,
        RUN,
        SEQUENCE,
        Originals,
        header,
        join,
        seal,
        split,
        tensors,
    )
    from tests.unit.keys import SIGNER
    from toolkit.bridge.authentication import UNSIGNED, Signer
    from toolkit.bridge.digests import digest_tensors
    from toolkit.bridge.errors import PayloadError
    from toolkit.bridge.payload import (
        Record,
        check_identity,
        check_sum,
        parse_record,
    )
    from toolkit.inner_products import all_finite

MAX_MESSAGE = 1000


def read(data: bytes, signer: Signer = UNSIGNED) -> Record | None:
    """As a receiver's job reads; None for what it refuses."""
    try:
        record = parse_record(data, signer)
        check_identity(record.header, run_id=RUN, job=JOB, sequence=SEQUENCE)
        check_sum(record, EXPECTED, "samples")
    except PayloadError as error:
        if len(str(error)) > MAX_MESSAGE:
            raise AssertionError("a message that fills the log") from error
        return None
    return record


class Reader:
    """Feeds inputs to the reader, and checks what it accepts."""

    def __init__(self, directory: Path) -> None:
        self._sources = [Originals(directory, signer) for signer in (UNSIGNED, SIGNER)]
        self.originals = {source.signer: source.data for source in self._sources}
        self.ways: list[Callable[[bytes], bool]] = [
            self.whole_file, self.signed_file, self.header_text, self.safetensors_header,
        ]  # fmt: skip
        self.accepted = [0] * len(self.ways)

    def seeds(self) -> list[bytes]:
        """An input for each way, which is accepted."""
        unsigned, signed = self.originals[UNSIGNED], self.originals[SIGNER]
        text, _ = split(unsigned)
        fields = json.loads(text)
        inner = fields.pop("__metadata__")["gradient_bridge"].encode()
        parts = [unsigned, signed, inner, json.dumps(fields).encode()]
        return [bytes([way]) + part for way, part in enumerate(parts)]

    def damaged_seeds(self) -> list[bytes]:
        """A small mutant of each kind, which are refused or equal to the original."""
        return [
            bytes([way]) + mutant(source, number)[1][: 2**14]
            for way, source in enumerate(self._sources)
            for number in range(3 * len(CHANGES))
        ]

    def take(self, data: bytes) -> None:
        """One input of the fuzzer."""
        way = data[0] % len(self.ways) if data else 0
        self.accepted[way] += self.ways[way](data[1:])

    def whole_file(self, data: bytes) -> bool:
        return self._is_original(data, UNSIGNED)

    def signed_file(self, data: bytes) -> bool:
        return self._is_original(data, SIGNER)

    def _is_original(self, data: bytes, signer: Signer) -> bool:
        record, original = read(data, signer), parse_record(self.originals[signer], signer)
        if record is None:
            return False
        assert record.header == original.header
        assert digest_tensors(record.tensors) == digest_tensors(original.tensors)
        return True

    def header_text(self, data: bytes) -> bool:
        """A header of this text, whose digest fits, in the true tensors' file."""
        text = data.decode("latin-1")
        record = read(save(tensors(), metadata=seal(text)))
        if record is None:
            return False
        assert dataclasses.asdict(record.header) == json.loads(text)
        assert record.header.tensors_digest == digest_tensors(tensors())
        return True

    def safetensors_header(self, data: bytes) -> bool:
        """A safetensors header of this JSON, before the true data; digests and metadata fit it."""
        body = split(self.originals[UNSIGNED])[1]
        try:
            digest = digest_tensors(load(join(data, body)))
        except Exception:  # what safetensors and torch raise is what the reader has to refuse
            digest = ""
        fields = {**dataclasses.asdict(header()), "tensors_digest": digest}
        metadata = json.dumps(seal(json.dumps(fields))).encode()
        whole = data.rstrip()[:-1] + b',"__metadata__":' + metadata + b"}"
        record = read(join(whole, body))
        if record is None:
            return False
        assert record.tensors.keys() == EXPECTED.keys()
        for name, like in EXPECTED.items():
            assert record.tensors[name].shape == like.shape
            assert record.tensors[name].dtype == like.dtype
        assert all_finite(record.tensors.values())
        assert math.isfinite(record.header.count)
        return True


def main() -> None:
    """Fuzz until libFuzzer's limits, or a finding."""
    assert atheris is not None, 'atheris is missing: pip install -e ".[fuzz]"'
    directory = Path(tempfile.mkdtemp(prefix="fuzz-"))
    reader = Reader(directory)
    arguments = sys.argv[1:]
    if not any(not argument.startswith("-") for argument in arguments):
        (directory / "corpus").mkdir()
        arguments = [str(directory / "corpus"), *arguments]
    corpus = Path(next(argument for argument in arguments if not argument.startswith("-")))
    for number, seed in enumerate([*reader.seeds(), *reader.damaged_seeds()]):
        (corpus / f"seed-{number}").write_bytes(seed)
    executions = 0

    def take(data: bytes) -> None:
        nonlocal executions
        reader.take(data)
        executions += 1
        if executions % 10_000 == 0:
            print(f"{executions} inputs, accepted by way: {reader.accepted}", flush=True)

    atheris.Setup([sys.argv[0], *arguments], take)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
