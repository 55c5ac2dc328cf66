"""What ``gradient-bridge inspect`` says of a run's payloads, and how."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.unit.run_files import Inspect, SmallRun, Streams, flip, num_bytes
from toolkit import cli
from toolkit.bridge.authentication import Signer
from toolkit.inspection.command import find_runs, watch
from toolkit.inspection.report import Report


def donor_of(run: dict[str, Any]) -> dict[str, Any]:
    (fates,) = run["fates"]
    return dict(fates)


def stream_of(run: dict[str, Any], name: str) -> dict[str, Any]:
    return next(stream for stream in run["streams"] if stream["name"] == name)


def test_that_the_books_are_the_receivers_own(small: SmallRun, inspect: Inspect) -> None:
    status, run = inspect(small.run_dir)

    expected = small.receiver.fates_by_donor()["donor"]
    alien = expected.pop("alien")
    assert {name: donor_of(run)[name] for name in expected} == expected
    assert expected == {
        "applied": 3, "dropped": 1, "rejected": 1, "skipped": 1, "pending": 1, "published": 7,
    }  # fmt: skip
    assert alien == 0
    assert donor_of(run)["adds_up"] is True
    assert donor_of(run)["reasons"] == {"dropped": {"stale": 1}, "rejected": {"nonfinite": 1}}
    assert (status, run["problems"], run["ok"]) == (0, [], True)


def test_that_a_stream_is_told_as_it_is(small: SmallRun, inspect: Inspect, tmp_path: Path) -> None:
    bridge = shutil.copytree(small.run_dir, tmp_path / "copy") / "bridge"
    records = bridge / "donor" / "records"
    (records / "README").write_bytes(b"none")
    (records / ".tmp-crashed").write_bytes(bytes(77))
    os.link(
        records / "0000000006.safetensors", bridge / "donor" / "kept" / "0000000006.safetensors"
    )

    _, run = inspect(tmp_path / "copy")

    stream = stream_of(run, "donor")
    assert stream == {
        "name": "donor", "carries": "payloads", "published": 7, "present": 6,
        "num_bytes": num_bytes(bridge / "donor"),
        "acknowledged": 6, "rejected": {"nonfinite": 1}, "kept": 4, "alien": ["README"],
    }  # fmt: skip
    assert run["temporary_files"] == [
        {"path": "bridge/donor/records/.tmp-crashed", "num_bytes": 77}
    ]
    assert stream_of(run, "receiver")["carries"] == "weights"
    assert run["num_bytes"] == num_bytes(bridge)


def test_that_a_file_that_is_being_written_is_none_left_behind(tmp_path: Path) -> None:
    run_dir = Streams(tmp_path / "0001").run_dir
    path = run_dir / "bridge" / "donor" / "records" / ".tmp-grows"
    path.write_bytes(b"1")
    (look,), _ = watch([run_dir], 0.01)
    path.write_bytes(b"12")

    assert look.report().temporary_files == []


def test_that_with_the_key_only_what_is_signed_is_believed(
    tmp_path: Path, inspect: Inspect
) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    key.chmod(0o600)
    streams = Streams(tmp_path / "0001", signer=Signer(b"k" * 32))
    for sequence in range(3):
        streams.publish(sequence)
    streams.settle(1, 0)
    status, run = inspect(streams.run_dir, "--verify", "--key_file", str(key))
    assert (status, run["run_id"]) == (0, "run")
    assert (donor_of(run)["applied"], donor_of(run)["pending"]) == (1, 2)
    assert [job["start"] for job in run["jobs"]] == [1, 1]

    forger = Streams(tmp_path / "0002")
    forger.publish(2)
    forged = forger.transport.path("donor", 2)
    shutil.copyfile(forged, streams.transport.path("donor", 2))
    status, run = inspect(streams.run_dir, "--verify", "--key_file", str(key))
    (bad,) = run["verified"]["bad"]
    assert (status, bad["reason"]) == (1, "unauthenticated")

    status, run = inspect(streams.run_dir)
    assert status == 1
    (problem,) = run["problems"]
    assert "has another key than this job" in problem
    assert [job["start"] for job in run["jobs"]] == [1, 1]
    assert [job["host"] for job in run["jobs"]] == [None, None]


# -- what is asked for, and how it is told --------------------------------------------------


def test_that_a_run_is_found_by_its_path_its_name_or_its_directory(tmp_path: Path) -> None:
    first, named = (Streams(tmp_path / name).run_dir for name in ("0001", "named"))
    (tmp_path / "no-run").mkdir()
    (tmp_path / "0007").write_bytes(b"")

    assert find_runs(None, tmp_path) == (tmp_path, [first, named])
    assert find_runs(str(tmp_path), Path("runs")) == (tmp_path, [first, named])
    assert find_runs("named", tmp_path) == (named, [named])
    assert find_runs(str(first), Path("runs")) == (first, [first])


def test_that_no_run_is_an_error_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", "0009", "--runs_dir", str(tmp_path), "--json"]) == 2

    out, err = capsys.readouterr()
    assert f"no run in 0009 or in {tmp_path}/0009. Give the --runs_dir" in err
    assert json.loads(out)["error"] in err


def test_that_the_shape_of_the_json_stays(small: SmallRun, inspect: Inspect) -> None:
    _, run = inspect(small.run_dir, "--verify")

    assert set(run) == {
        "ok", "directory", "name", "run_id", "exchange", "class_names", "jobs", "streams", "fates",
        "num_bytes", "temporary_files", "verified", "problems",
    }  # fmt: skip
    assert set(run["jobs"][0]) == {
        "name", "role", "heads", "compression", "start", "state", "receiver_step", "donor_step",
        "host", "pid",
    }  # fmt: skip
    assert set(donor_of(run)) == {
        "donor", "published", "applied", "dropped", "rejected", "skipped", "pending",
        "settled_before", "reasons", "unaccounted", "repeated", "adds_up",
    }  # fmt: skip
    assert set(run["verified"]) == {"num_records", "num_bytes", "bad"}
    fields = {field.name for field in dataclasses.fields(Report)}
    assert fields == {"format", "directory", "watched_seconds", "runs"}


def test_that_a_run_is_told_in_tables_that_fit_a_terminal(
    small: SmallRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (small.bridge / "donor" / "records" / "\x1b[2Jname").write_bytes(b"")
    flip(small.record(6))

    status = cli.main(["inspect", str(small.run_dir), "--seconds", "0.3", "--verify"])

    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["receiver", "alive", "4", "heads.h2", "1", str(os.getpid())] in [x[:6] for x in lines]
    assert ["donor", "3", "1", "1", "1", "1", "7", "yes"] in lines
    assert "payloads of donor: 1 dropped (stale), 1 rejected (nonfinite)" in out
    assert "WRONG: bridge/donor/records/0000000006.safetensors" in out
    assert r"\x1b[2Jname" in out
    assert "\x1b" not in out
    assert "nothing is wrong" not in out
    assert status == 1


def test_that_several_runs_are_told_in_a_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    good, bad = (Streams(tmp_path / name) for name in ("0001", "0002"))
    good.settle(1, 0, 1)
    bad.settle(1, 0, 2)

    assert cli.main(["inspect", "--runs_dir", str(tmp_path), "--seconds", "0.1"]) == 1

    out = capsys.readouterr().out
    line = "gradient receiver silent, donor silent"
    rows = [" ".join(row.split()) for row in out.splitlines()]
    assert f"0001 {line} 2 2 applied {num_bytes(good.run_dir)} bytes" in rows
    assert any(row.startswith(f"0002 {line} 3 do not add up: 2 applied") for row in rows)
    assert "WRONG: run 0002: payloads of the donor have no fate, though passed over: 1" in out
