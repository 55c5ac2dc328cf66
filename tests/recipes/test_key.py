"""Jobs launched with a key: as exact as without, for who has it; for others nothing."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tests.oracle import largest_difference
from tests.recipes.running import DONOR, JOINT, RECEIVER, ROOT, TIMEOUT, Recipes, wait_until
from toolkit.bridge.authentication import KEY_VARIABLE
from toolkit.cli import main

pytestmark = pytest.mark.slow
KEY, OTHER_KEY = "a key that no file may hold", "the key of somebody else"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """The key, outside of the directories that must not hold it."""
    path = tmp_path / "secrets" / "key"
    path.parent.mkdir()
    path.touch(0o600)
    path.write_text(KEY + "\n")
    return path


@pytest.mark.parametrize("exchange", ["auto", "distill"])
def test_that_both_jobs_with_a_key_train_as_one(
    recipes: Recipes,
    key_file: Path,
    exchange: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    flags: list[object] = ["--max_train_steps", 20, "--exchange", exchange]
    receiver_flags = [] if exchange == "distill" else ["--keep_payloads"]
    donor = recipes(DONOR, "--exchange", exchange, "--key_file", key_file, num_processes=2)
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    receiver = recipes(RECEIVER, *flags, *receiver_flags, num_processes=2)
    for job in (receiver, donor):
        job.wait(TIMEOUT)
        assert "which signs with a key" in job.output()
        assert "is ignored" not in job.output()
    monkeypatch.delenv(KEY_VARIABLE)

    results = recipes.results("0001", "receiver")
    assert results["num_processes"] == 2
    if exchange == "auto":
        assert results["fates"]["applied"] == 20
        ranks = ["--receiver_processes", 2, "--donor_processes", 2]
        joint = recipes(JOINT, *flags[:2], *ranks, "--output_dir", recipes.path("joint"))
        joint.wait(TIMEOUT)
        weights = recipes.weights("0001", "receiver")
        assert largest_difference(weights, recipes.weights("joint")) <= 1e-12
        run = ["0001", "--runs_dir", str(recipes.path())]
        assert main(["verify", *run]) == 2
        assert "it is signed, but no key is given here" in capsys.readouterr().err
        assert main(["verify", *run, "--key_file", str(key_file)]) == 0
    else:
        assert "teaches with its weights" in receiver.output()

    for path in [*recipes.path().rglob("*"), *recipes.cwd.glob("*.log")]:
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    bridge = recipes.path("0001", "bridge")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (bridge, *bridge.rglob("*"))}
    assert modes == {0o600, 0o700}


def test_that_jobs_with_two_keys_part_at_once(
    recipes: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    receiver = recipes(RECEIVER, "--peer_wait", 600)
    wait_until(recipes.path("0001", "bridge", "receiver", "heartbeat").exists, "the receiver")
    monkeypatch.setenv(KEY_VARIABLE, OTHER_KEY)
    donor = recipes(DONOR, "--peer_wait", 600, num_processes=2)

    assert donor.wait(60, check=False) != 0
    assert "error: run '0001' has another key than this job" in donor.output()
    assert KEY_VARIABLE in donor.output()
    assert "Traceback" not in donor.output().split("error: run")[0]
    assert receiver.is_running()
    assert [path.name for path in recipes.path().iterdir()] == ["0001"]
