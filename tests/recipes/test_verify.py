"""``gradient-bridge verify``: runs that really were trained, replayed without their donor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.launching import Launcher
from tests.recipes.running import DONOR, RECEIVER, ROOT, TIMEOUT, Recipes, wait_until
from toolkit.cli import main

LEDGERS = Path("bridge", "receiver")
KEPT = Path("bridge", "donor", "kept")


class Verify:
    """The command in this process, which spares the import of torch; what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *flags: object) -> tuple[int, str, str]:
        with self._monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", str(ROOT))
            # As a shell has it where several processes meet.
            patch.setenv("MASTER_PORT", "29500")
            status = main(["verify", *map(str, flags)])
        printed = self._capsys.readouterr()
        return status, printed.out, printed.err


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Verify:
    return Verify(capsys, monkeypatch)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs directory of one rank that was killed and went on from a checkpoint."""
    directory = tmp_path_factory.mktemp("resumed")
    checkpoints = ["--checkpointing_steps", 10, "--checkpoints_total_limit", 1]
    with Launcher(directory) as launcher:
        recipes = Recipes(launcher, directory)
        donor = recipes(DONOR)
        receiver = recipes(RECEIVER, "--keep_payloads", *checkpoints, "--max_train_steps", 2000)
        wait_until(recipes.path("0001", "receiver", "step_20").exists, "the second checkpoint")
        receiver.kill()
        resume = ["--resume_from_checkpoint", "latest", "--max_train_steps", 60]
        recipes(RECEIVER, "--keep_payloads", *checkpoints, *resume).wait(TIMEOUT)
        donor.wait(TIMEOUT)
    return recipes.path()


def test_a_run_that_was_killed_and_resumed(resumed: Path, tmp_path: Path) -> None:
    ledgers = sorted(path.name for path in (resumed / "0001" / LEDGERS).glob("ledger-*"))
    assert ledgers == ["ledger-0001.jsonl", "ledger-0002.jsonl"]
    done = subprocess.run(
        [sys.executable, "-m", "toolkit.cli", "verify", "0001"],
        capture_output=True,
        text=True,
        cwd=resumed.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "TMPDIR": str(tmp_path)},
    )

    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.replace("│", " ").split() for line in done.stdout.splitlines()]
    for row in ("steps 60", "payloads applied 60", "largest difference 0", "bitwise equal yes"):
        assert row.split() in rows, done.stdout
    assert "warning" not in done.stdout
    assert "checking payloads" in done.stderr
    assert [path.name for path in resumed.iterdir()] == ["0001"], "the replay leaves nothing behind"
    assert not list(tmp_path.glob("gradient-bridge-*")), "the replay leaves nothing behind"


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["none", "topk"])
def test_kills_of_jobs_that_write_beside_their_steps(
    recipes: Recipes, verify: Verify, compression: str
) -> None:
    """What the receiver's ledgers say was applied is what gives its weights, kills or not."""
    donor_flags = ["--compression", compression]
    flags = ["--keep_payloads", "--max_staleness", 3, "--checkpointing_steps", 10]
    donor = recipes(DONOR, *donor_flags)
    receiver = recipes(RECEIVER, *flags, "--max_train_steps", 2000)
    for number in (20, 50, 70):
        step = recipes.path("0001", "receiver", f"step_{number}")
        wait_until(step.exists, f"the checkpoint at step {number}")
        receiver.kill()
        if number == 50:
            donor.kill()
            donor = recipes(DONOR, "--run", "0001", *donor_flags)
        last = 90 if number == 70 else 2000
        resume = ["--resume_from_checkpoint", "latest", "--max_train_steps", last]
        receiver = recipes(RECEIVER, *flags, *resume)
    receiver.wait(TIMEOUT)
    donor.wait(TIMEOUT)
    status, out, err = verify("0001", "--runs_dir", recipes.path(), "--json")

    assert status == 0, out + err
    figures = json.loads(out)
    assert figures["bitwise_equal"], figures
    assert figures["steps"] == 90
    assert recipes.results("0001", "receiver")["fates"]["applied"] >= 60


@pytest.mark.slow
def test_two_ranks_with_settings_of_their_own_and_steps_alone(
    recipes: Recipes, verify: Verify
) -> None:
    settings = [
        "--dtype", "float32", "--mixed_precision", "bf16", "--per_device_train_batch_size", 7,
        "--gradient_accumulation_steps", 2, "--max_grad_norm", 1, "--aggregate", "pcgrad",
        "--rescale", "append", "--max_staleness", 1, "--lr_scheduler_type", "linear",
        "--max_train_steps", 12, "--output_dir", "elsewhere", "--no-with_tracking",
    ]  # fmt: skip
    jobs = [
        recipes(DONOR, "--dtype", "float32", "--max_train_steps", 8),
        recipes(RECEIVER, "--keep_payloads", *settings, num_processes=2),
    ]
    for job in jobs:
        job.wait(TIMEOUT)
    status, out, err = verify(
        "0001", "--runs_dir", recipes.path(), "--output_dir", recipes.cwd / "elsewhere", "--json"
    )

    assert status == 0, out + err
    figures = json.loads(out)
    results = json.loads((recipes.cwd / "elsewhere" / "results.json").read_bytes())
    assert results["num_processes"] == 2
    assert figures["bitwise_equal"]
    assert (figures["differences"], figures["largest_difference"]) == ({}, 0.0)
    assert figures["payloads_applied"] == results["fates"]["applied"] > 0
    assert figures["steps_alone"] == results["steps_alone"] >= 4
    assert (figures["steps"], figures["device"], figures["warnings"]) == (12, "cpu", [])


@pytest.fixture
def copied(resumed: Path, tmp_path: Path) -> Path:
    """A run of this test's own, to meddle with."""
    run = tmp_path / "runs" / "0001"
    shutil.copytree(resumed / "0001", run)
    return run


def flip_bit_of_payload(run: Path) -> None:
    path = run / KEPT / "0000000003.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def delete_payload(run: Path) -> None:
    (run / KEPT / "0000000003.safetensors").unlink()


def put_another_payload_in_its_place(run: Path) -> None:
    shutil.copy(run / KEPT / "0000000004.safetensors", run / KEPT / "0000000003.safetensors")


def forget_the_flag(run: Path) -> None:
    path = run / "receiver" / "results.json"
    results = json.loads(path.read_bytes())
    results["provenance"]["arguments"]["keep_payloads"] = False
    path.write_text(json.dumps(results))


def forget_the_end(run: Path) -> None:
    (run / "receiver" / "results.json").unlink()


def begin_again(run: Path) -> None:
    attempts = run / "bridge" / "receiver" / "attempts"
    shutil.copy(attempts / "0002.json", attempts / "0003.json")


def break_ledger(run: Path) -> None:
    with (run / LEDGERS / "ledger-0002.jsonl").open("a") as file:
        file.write("{}\n")


def write_results_of_another_run(run: Path) -> None:
    path = run / "receiver" / "results.json"
    results = json.loads(path.read_bytes())
    results["provenance"]["run_id"] = "another"
    path.write_text(json.dumps(results))


def forget_the_ranks(run: Path) -> None:
    path = run / "receiver" / "results.json"
    results = json.loads(path.read_bytes())
    del results["num_processes"]
    path.write_text(json.dumps(results))


def forget_the_weights(run: Path) -> None:
    (run / "receiver" / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("meddle", "phrases"),
    [
        (flip_bit_of_payload, ["payload 3 (", "was changed", "digest does not match"]),
        (delete_payload, ["payload 3 was applied but is not kept", "needs --keep_payloads"]),
        (put_another_payload_in_its_place, ["payload 3 (", "sequence is 4, expected 3"]),
        (forget_the_flag, ["kept no payloads", "train with --keep_payloads on the receiver"]),
        (forget_the_end, ["has not ended", "results.json", "Resume the receiver"]),
        (forget_the_weights, ["has not ended", "receiver/model.safetensors. Resume"]),
        (forget_the_ranks, ["does not hold the results of recipes/receiver.py", "num_processes"]),
        (write_results_of_another_run, ["holds the results of another run", "--output_dir"]),
        (begin_again, ["was gone on with (start 3", "results of start 2", "resume it"]),
        (break_ledger, ["ledger-0002.jsonl is no line of a ledger"]),
    ],
)
def test_what_cannot_be_replayed(
    copied: Path, verify: Verify, meddle: Callable[[Path], None], phrases: list[str]
) -> None:
    meddle(copied)
    status, out, err = verify(copied, "--json")

    assert status == 2, out + err
    error = json.loads(out)["error"]
    for phrase in phrases:
        assert phrase in error
    assert f"error: {error}" in err
    assert "replaying" not in error, "it began before it looked"


def test_a_run_that_is_not_there(verify: Verify) -> None:
    status, out, err = verify("0007", "--runs_dir", "mine")

    assert (status, out) == (2, "")
    assert "there is no run '0007': looked for 0007 and mine/0007" in err


def test_what_the_system_refuses_is_no_verdict_on_the_weights(verify: Verify) -> None:
    status, out, err = verify("7" * 300)

    assert (status, out) == (2, "")
    assert "File name too long" in err


@pytest.mark.slow
def test_a_changed_weight(copied: Path, verify: Verify) -> None:
    path = copied / "receiver" / "model.safetensors"
    weights = load_file(path)
    weights["heads.h1.weight"].view(torch.int64)[2, 3] ^= 1
    save_file(weights, path)
    status, out, err = verify(copied)

    assert status == 1, out + err
    assert "replaying" in err
    assert "not those that the run wrote" in out
    assert "tensors that differ: heads.h1.weight (by " in out
    assert "the replay had other weights" not in out
    assert "the receiver was started 2 times; the replay has the arguments of the last" in out


@pytest.mark.slow
def test_a_changed_ledger(copied: Path, verify: Verify) -> None:
    """Two payloads change places, each with its own digest; the results tell of one step more."""
    results_path = copied / "receiver" / "results.json"
    results = json.loads(results_path.read_bytes())
    results["provenance"]["environment"]["torch"] = "1.0"
    results_path.write_text(json.dumps(results | {"completed_steps": 61}))
    path = copied / LEDGERS / "ledger-0001.jsonl"
    entries: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    entries[3]["receiver_step"], entries[4]["receiver_step"] = 4, 3
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    status, out, err = verify(copied, "--json")

    assert status == 1, out + err
    figures = json.loads(out)
    assert not figures["bitwise_equal"]
    assert 0 < figures["largest_difference"] == max(figures["differences"].values())
    assert "backbone" in next(iter(figures["differences"]))
    assert figures["departed_at"] == 4
    assert figures["warnings"] == [
        f"torch: the run had 1.0, the replay has {torch.__version__}; bits may differ",
        "the ledger has 60 steps in which payloads were applied, but results.json has 61 "
        "steps, 0 of them alone",
        "the replay took 60 steps, and the run 61",
    ]
