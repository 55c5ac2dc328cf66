"""Damaged, crafted and misplaced files through the reader of a receiver's job.

A file is accepted if reading it gives a record. What may be accepted in the place of record 3 is
exactly the content that its donor wrote: a header equal in every field, and tensors equal in name,
dtype, shape and every bit (their digest, computed anew). The bytes may differ where they mean
nothing to that content: white space and the order of keys in the JSON of the safetensors header.
Without a key a stranger can craft a valid record of any values, which nothing can tell: crafted
files lie about something that a receiver checks. With a key, all that the forger crafts is refused.
"""

from __future__ import annotations

import contextlib
import resource
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.mutants import CHANGES, MAY_BE_EQUAL, mutant
from tests.faults.originals import EXPECTED, JOB, LIMIT, RUN, SEQUENCE, Originals
from tests.unit.keys import SIGNER
from toolkit.bridge.authentication import UNSIGNED, Signer
from toolkit.bridge.digests import digest_tensors
from toolkit.bridge.errors import PayloadError
from toolkit.bridge.payload import Record, check_identity, check_sum, parse_record
from toolkit.bridge.transport import DirectoryTransport

# What reading one file of LIMIT bytes may take at most. JSON text becomes objects of up to 75 times
# its size (lists in lists, in Python and then in safetensors: measured); what is more than that was
# not bounded before it was allocated.
MEMORY_BYTES = 128 * LIMIT
MAX_MESSAGE = 1000  # characters; it goes into the log and into the note to the donor


@pytest.fixture(params=[UNSIGNED, SIGNER], ids=["no key", "key"])
def transport(request: pytest.FixtureRequest, tmp_path: Path) -> DirectoryTransport:
    signer: Signer = request.param
    (tmp_path / "bridge").mkdir()
    transport = DirectoryTransport(tmp_path / "bridge", signer)
    transport.open_stream(JOB)
    return transport


def read(transport: DirectoryTransport) -> Record:
    """As a receiver's job reads and judges one record (``Job._read``, ``Inbox``)."""
    record = parse_record(transport.read(JOB, SEQUENCE, max_bytes=LIMIT), transport.signer)
    check_identity(record.header, run_id=RUN, job=JOB, sequence=SEQUENCE)
    check_sum(record, EXPECTED, "samples")
    return record


@contextlib.contextmanager
def bounded_memory(more_bytes: int) -> Iterator[None]:
    """Within it no more than so much memory can be had beyond the present; else ``MemoryError``."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def content(record: Record) -> tuple[object, str]:
    return record.header, digest_tensors(record.tensors)


def read_mutants(transport: DirectoryTransport, originals: Originals, numbers: range) -> None:
    """Read these mutants; nothing but the original's content comes back, nothing else is raised."""
    path, start = transport.path(JOB, SEQUENCE), time.monotonic()
    path.write_bytes(originals.data)
    original, longest = content(read(transport)), 0
    equal: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    with bounded_memory(MEMORY_BYTES):
        for number in numbers:
            kind, data = mutant(originals, number)
            path.write_bytes(data)
            try:
                record = read(transport)
            except PayloadError as error:
                refused[kind] += 1
                reasons[error.reason] += 1
                longest = max(longest, len(str(error)))
                continue
            except BaseException as error:
                raise AssertionError(f"mutant {number} ({kind}) raised {error!r}") from error
            assert content(record) == original, f"mutant {number} ({kind}) made another record"
            equal[kind] += 1
    print(
        f"{len(numbers)} mutants in {time.monotonic() - start:.0f} s: {refused.total()} refused "
        f"{dict(reasons)}, {equal.total()} with the original's content {dict(equal)}"
    )
    assert refused.total() + equal.total() == len(numbers)
    assert longest <= MAX_MESSAGE
    assert set(equal) <= MAY_BE_EQUAL
    assert set(refused) | {"white_space"} == {change.__name__ for change in CHANGES}


def test_that_no_mutated_file_is_read_as_another_record(
    transport: DirectoryTransport, tmp_path: Path
) -> None:
    read_mutants(transport, Originals(tmp_path, transport.signer), range(10 * len(CHANGES)))


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_that_none_of_50_000_mutated_files_is_read_as_another_record(
    transport: DirectoryTransport, tmp_path: Path
) -> None:
    read_mutants(transport, Originals(tmp_path, transport.signer), range(50_000))


@pytest.mark.parametrize("num_bytes", [LIMIT + 1, 2**40])
def test_that_a_file_beyond_the_limit_is_refused_without_reading_it(
    transport: DirectoryTransport, tmp_path: Path, num_bytes: int
) -> None:
    data = Originals(tmp_path, transport.signer).data
    with transport.path(JOB, SEQUENCE).open("wb") as file:
        file.write(data)
        file.truncate(num_bytes)  # takes no disk, but memory of who reads it
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError) as caught:
            read(transport)
        assert tracemalloc.get_traced_memory()[1] < 2**19
    finally:
        tracemalloc.stop()
    assert caught.value.reason == "too_large"
