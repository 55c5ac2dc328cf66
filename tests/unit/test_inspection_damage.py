"""``gradient-bridge inspect`` on damaged runs: each damage is named, the rest is shown."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.run_files import Inspect, SmallRun, Streams, cut, flip, plain_files
from toolkit.bridge.payload import parse_record, write_record

# -- the bytes ------------------------------------------------------------------------------------


def swap(path: Path) -> None:
    path.write_bytes(path.with_name("0000000005.safetensors").read_bytes())


def enlarge(path: Path) -> None:
    os.truncate(path, 2**34)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip, "digest"), (cut, "truncated"), (swap, "alien"), (enlarge, "too_large"),
        (pipe, "not_a_file"), (loop, "not_a_file"),
    ],
)  # fmt: skip
def test_that_a_bad_record_is_named_with_its_reason(
    tmp_path: Path, inspect: Inspect, damage: Callable[[Path], None], reason: str
) -> None:
    streams = Streams(tmp_path / "0001")
    streams.start("receiver", 2, record_bytes=2**20)
    for sequence in range(6):
        streams.publish(sequence)
    assert inspect(streams.run_dir, "--verify")[1]["verified"]["num_records"] == 6
    damage(streams.transport.path("donor", 4))
    assert inspect(streams.run_dir)[0] == 0

    status, run = inspect(streams.run_dir, "--verify")

    (bad,) = run["verified"]["bad"]
    assert bad["path"] == "bridge/donor/records/0000000004.safetensors"
    assert bad["reason"] == reason
    assert run["verified"]["num_records"] == 6
    assert (status, run["ok"]) == (1, False)
    assert bad["path"] in run["problems"][0]


def test_that_kept_records_are_verified_once_and_against_the_ledger(
    small: SmallRun, inspect: Inspect
) -> None:
    for sequence in (0, 1):  # deleted, and kept under its other name
        small.record(sequence).unlink()
    _, run = inspect(small.run_dir, "--verify")
    sizes = [p.stat().st_size for p in plain_files(small.bridge) if p.parent.name == "records"]
    kept = small.receiver.transport.kept_path("donor", 0)
    # The record of the payload that was refused lies elsewhere.
    assert run["verified"]["num_records"] == len(sizes) + 1
    assert run["verified"]["num_bytes"] == sum(sizes) + kept.stat().st_size
    assert run["verified"]["bad"] == []

    record = parse_record(kept.read_bytes())
    kept.unlink()
    write_record(kept, record.header, small.constant(9.0))
    status, run = inspect(small.run_dir, "--verify")

    assert [bad["path"] for bad in run["verified"]["bad"]] == [
        "bridge/donor/kept/0000000000.safetensors"
    ]
    assert "another payload was applied" in run["problems"][0]
    assert status == 1


# -- damage ---------------------------------------------------------------------------------------

DEEP = b"[" * 100_000


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def make(bridge: Path) -> None:
        (bridge / name).write_bytes(content)

    return make


def put_pipe(name: str) -> Callable[[Path], None]:
    def make(bridge: Path) -> None:
        (bridge / name).unlink(missing_ok=True)
        os.mkfifo(bridge / name)

    return make


def put_directory(name: str) -> Callable[[Path], None]:
    def make(bridge: Path) -> None:
        (bridge / name).unlink(missing_ok=True)
        (bridge / name).mkdir()

    return make


def no_records(bridge: Path) -> None:
    shutil.rmtree(bridge / "donor" / "records")
    (bridge / "donor" / "records").write_bytes(b"")


CLAIM, NOTE, LEDGER = "donor/attempts/0001.json", "donor/rejected/0000000002.json", "ledger-0001"
DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("terms are garbage", write("run.json", b"\xff{"), "bridge/run.json cannot be read"),
    ("terms are a list", write("run.json", b"[1]"), "bridge/run.json cannot be read"),
    ("terms are deep", write("run.json", DEEP), "bridge/run.json cannot be read"),
    ("terms are missing", lambda b: (b / "run.json").unlink(), "bridge/run.json cannot be read"),
    ("terms are a pipe", put_pipe("run.json"), "bridge/run.json is no plain file"),
    ("terms are a directory", put_directory("run.json"), "run.json is no plain file"),
    ("claim is garbage", write(CLAIM, b"{"), "the claim of the donor cannot be read"),
    ("claim is a pipe", put_pipe(CLAIM), f"bridge/{CLAIM} is no plain file"),
    ("claim is deep", write(CLAIM, DEEP), "the claim of the donor cannot be read"),
    ("heart is a pipe", put_pipe("donor/heartbeat"), "bridge/donor/heartbeat is no plain file"),
    ("mark is a pipe", put_pipe("donor/acknowledged"), "bridge/donor/acknowledged is no plain"),
    ("note is a pipe", put_pipe(NOTE), f"bridge/{NOTE} is no plain file"),
    ("ledger is garbage", write(f"receiver/{LEDGER}.jsonl", b"{}\n"), "the ledger cannot be read"),
    ("ledger is a pipe", put_pipe(f"receiver/{LEDGER}.jsonl"), f"{LEDGER}.jsonl is no plain file"),
    ("ledger is deep", write(f"receiver/{LEDGER}.jsonl", DEEP + b"\n"), "the ledger cannot be"),
    ("records are a file", no_records, "donor cannot be read"),
]  # fmt: skip


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all kinds of files, to be copied and damaged."""
    streams = Streams(tmp_path_factory.mktemp("pattern") / "0001")
    for sequence in range(4):
        streams.publish(sequence)
    streams.settle(1, 0, 1)
    streams.transport.acknowledge("donor", 2)
    streams.transport.reject("donor", 2, "digest", "")
    streams.transport.beat("donor", 1)
    return streams.run_dir


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("damage", "problem"), [pytest.param(*rest, id=name) for name, *rest in DAMAGES]
)
def test_that_damage_is_named_and_the_rest_is_shown(
    pattern: Path, tmp_path: Path, inspect: Inspect, damage: Callable[[Path], None], problem: str
) -> None:
    run_dir = tmp_path / "0001"
    shutil.copytree(pattern, run_dir)
    status, run = inspect(run_dir, "--verify")
    assert (status, run["problems"]) == (0, [])

    damage(run_dir / "bridge")
    status, run = inspect(run_dir, "--verify")

    assert status == 1
    assert [text for text in run["problems"] if problem in text]
    assert [stream["carries"] for stream in run["streams"] if stream["name"] == "receiver"] == [
        "weights"
    ]
    jobs = [(job["name"], job["state"]) for job in run["jobs"]]
    assert jobs == [("receiver", "silent"), ("donor", "silent")]


@pytest.mark.parametrize("names", [[], ["bridge"], ["bridge/donor/records"], ["bridge/donor"]])
def test_that_empty_directories_are_runs_that_nobody_has_joined(
    tmp_path: Path, inspect: Inspect, names: list[str]
) -> None:
    run_dir = tmp_path / "0001"
    for name in ["", *names]:
        (run_dir / name).mkdir(parents=True, exist_ok=True)

    status, run = inspect(tmp_path)

    assert (status, run["problems"]) == (0, [])
    assert run["name"] == "0001"
