"""The launching of real jobs: as many ranks as asked for, and nothing left behind."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.launching import Job, Launcher

COUNTING = """
import json, sys
from pathlib import Path
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
result = {
    "num_processes": accelerator.num_processes,
    "device": accelerator.device.type,
    "threads": __import__("torch").get_num_threads(),
}
Path(sys.argv[1], f"{accelerator.process_index}.json").write_text(json.dumps(result))
accelerator.wait_for_everyone()
accelerator.end_training()
"""

HANGING = """
import subprocess, sys, time
from pathlib import Path
from accelerate import PartialState

rank = PartialState(cpu=True).process_index
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(sys.argv[1], f"hanging-{rank}").write_text(str(child.pid))
time.sleep(600)
"""

FAILING = """
import sys
print("the reason, on stdout")
sys.exit("the reason, on stderr")
"""


@pytest.mark.parametrize("num_processes", [1, 2])
def test_that_a_job_has_as_many_ranks_as_asked_for(
    launcher: Launcher, tmp_path: Path, num_processes: int
) -> None:
    job = launcher(_script(tmp_path, COUNTING), tmp_path, num_processes=num_processes, cwd=tmp_path)

    job.wait(120)

    results = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    assert results == [{"num_processes": num_processes, "device": "cpu", "threads": 1}] * (
        num_processes
    )
    assert not job.processes()


def test_that_two_jobs_of_two_ranks_run_side_by_side(launcher: Launcher, tmp_path: Path) -> None:
    script = _script(tmp_path, COUNTING)
    directories = [tmp_path / "first", tmp_path / "second"]
    jobs = []
    for directory in directories:
        directory.mkdir()
        jobs.append(launcher(script, directory, num_processes=2))

    for job in jobs:
        job.wait(120)

    for directory in directories:
        assert json.loads((directory / "1.json").read_text())["num_processes"] == 2


@pytest.mark.parametrize(
    "how",
    [
        "end of the test",
        pytest.param("kill", marks=pytest.mark.slow),
        pytest.param("timeout", marks=pytest.mark.slow),
    ],
)
def test_that_a_hanging_job_is_killed_with_its_children(tmp_path: Path, how: str) -> None:
    with Launcher(tmp_path) as launcher:
        job = launcher(_script(tmp_path, HANGING), tmp_path, num_processes=2)
        elsewhere = tmp_path / "bystander"
        elsewhere.mkdir()
        bystander = launcher(_script(elsewhere, HANGING), elsewhere, num_processes=1)
        children = _wait_until_both_ranks_hang(job, tmp_path)
        processes = job.processes()
        assert {process.pid for process in processes} >= {job.process.pid, *children}
        assert len(processes) >= 5

        if how == "kill":
            job.kill()
        elif how == "timeout":
            with pytest.raises(AssertionError, match=r"still ran after 0\.1 s"):
                job.wait(0.1)
        if how != "end of the test":
            assert not job.processes()
            assert bystander.is_running()
    assert not job.processes()
    assert not bystander.processes()
    assert job.process.returncode == bystander.process.returncode == -signal.SIGKILL
    for process in processes:
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_that_a_failure_shows_what_the_job_printed(launcher: Launcher, tmp_path: Path) -> None:
    job = launcher(_script(tmp_path, FAILING), num_processes=2)

    with pytest.raises(AssertionError, match=r"ended with status [1-9]") as caught:
        job.wait(120)

    assert "the reason, on stdout" in str(caught.value)
    assert "the reason, on stderr" in str(caught.value)
    assert job.wait(1, check=False) != 0


def _script(directory: Path, source: str) -> Path:
    path = directory / "script.py"
    path.write_text(source)
    return path


def _wait_until_both_ranks_hang(job: Job, directory: Path) -> list[int]:
    """The process ids of the children that the two ranks of HANGING have started."""
    paths = [directory / "hanging-0", directory / "hanging-1"]
    deadline = time.monotonic() + 120
    while not all(path.exists() and path.read_text() for path in paths):
        assert job.is_running(), job.output()
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.05)
    return [int(path.read_text()) for path in paths]
