"""Launch real jobs with ``accelerate launch``, read what they printed, and leave none behind.

torchrun puts every rank into a session of its own, so that killing the launcher's process group
leaves the ranks alive. A job is therefore the set of processes that carry its mark in their
environment, wherever they have been re-parented to.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
CPU_CONFIG = ROOT / "accelerate_configs" / "cpu_2proc.yaml"

_MARK = "GRADIENT_BRIDGE_TEST_JOB"
_TAIL_LINES = 80
_KILL_SECONDS = 20.0


@dataclass
class Job:
    """A launched job: the launcher and every process that descends from it.

    Args:
        name: what to call it in messages.
        process: the ``accelerate launch`` process.
        mark: the value by which its processes are known.
        log: the file with the output of the launcher and of all ranks.
    """

    name: str
    process: subprocess.Popen[bytes]
    mark: str
    log: Path

    def wait(self, timeout: float, *, check: bool = True) -> int:
        """Wait until the job has ended.

        Args:
            timeout: seconds after which the job is killed.
            check: whether an exit status other than 0 is an error.

        Returns:
            The exit status of the launcher.

        Raises:
            AssertionError: if it did not end in time, or failed and ``check`` is set; with the end
                of its output.
        """
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(self._report(f"still ran after {timeout} s")) from None
        if check and status != 0:
            raise AssertionError(self._report(f"ended with status {status}"))
        return status

    def is_running(self) -> bool:
        """Whether the launcher has not ended yet."""
        return self.process.poll() is None

    def processes(self) -> list[psutil.Process]:
        """Every living process of the job, the launcher included."""
        return [process for process in psutil.process_iter() if _mark_of(process) == self.mark]

    def kill(self) -> None:
        """SIGKILL every process of the job, and no other.

        Raises:
            AssertionError: if some process of the job survives.
        """
        deadline = time.monotonic() + _KILL_SECONDS
        while (alive := self.processes()) and time.monotonic() < deadline:
            for process in alive:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            # Who waits for the launcher gets its status, which must not be psutil.
            psutil.wait_procs([p for p in alive if p.pid != self.process.pid], timeout=1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
        if alive:
            raise AssertionError(self._report(f"survived SIGKILL: {alive}"))
        self.process.wait()

    def output(self) -> str:
        """What the launcher and all ranks have printed so far, both streams."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _report(self, problem: str) -> str:
        lines = self.output().splitlines()
        tail = "\n".join(lines[-_TAIL_LINES:])
        return f"job {self.name} {problem}; the last of its {len(lines)} lines:\n{tail}"


@dataclass
class Launcher:
    """Launches jobs for one test, and kills at its end those that are still alive.

    Args:
        directory: where the jobs' output goes.
    """

    directory: Path
    jobs: list[Job] = field(default_factory=list)

    def __call__(
        self,
        script: str | Path,
        *args: object,
        num_processes: int = 1,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        log: Path | None = None,
        config: Path = CPU_CONFIG,
        options: Sequence[object] = (),
        plainly: bool = False,
    ) -> Job:
        """``launch``, with a log file in ``directory`` unless ``log`` is given."""
        log = log or self.directory / f"job-{len(self.jobs)}-{Path(script).stem}.log"
        job = launch(
            script,
            *args,
            num_processes=num_processes,
            env=env,
            cwd=cwd,
            log=log,
            config=config,
            options=options,
            plainly=plainly,
        )
        self.jobs.append(job)
        return job

    def start(self, name: str, command: Sequence[str], **how: Any) -> Job:
        """:func:`start`, with a log file in ``directory``."""
        log = self.directory / f"job-{len(self.jobs)}-{name}.log"
        self.jobs.append(start(name, command, log=log, **how))
        return self.jobs[-1]

    def __enter__(self) -> Launcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for job in self.jobs:
            job.kill()


def launch(
    script: str | Path,
    *args: object,
    log: Path,
    num_processes: int = 1,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    config: Path = CPU_CONFIG,
    options: Sequence[object] = (),
    plainly: bool = False,
) -> Job:
    """Start ``script`` on the CPU under ``accelerate launch`` and return at once.

    Tests use the ``launcher`` fixture, which also ends the job.

    Args:
        script: the script; a relative path starts at ``cwd``.
        args: its arguments.
        log: the file for the output of all ranks; replaced.
        num_processes: ranks. More than one meet on a free port, so that jobs can run side by side.
        env: additions to this process's environment.
        cwd: the working directory; the repository root by default.
        config: the launcher's configuration for more than one rank.
        options: further ones of the launcher.
        plainly: without ``accelerate launch``: one rank by ``python``, several by ``torchrun``.
    """
    if num_processes == 1:
        launcher = ["--cpu", "--num_processes", "1"]
    else:
        # This file's `main_process_port: 0` lets the launcher choose a port just before it is used.
        launcher = ["--config_file", str(config), "--num_processes", str(num_processes)]
    launcher += map(str, options)
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, str(script)]
    if plainly:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        ranks = [*torchrun, str(num_processes)] if num_processes > 1 else []
        command = [sys.executable, *ranks, str(script)]
    name = f"{Path(script).name} ({num_processes} ranks)"
    return start(name, [*command, *map(str, args)], log=log, env=env, cwd=cwd)


def start(
    name: str,
    command: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Job:
    """Start a command that launches a job on the CPU, and return at once; see :func:`launch`."""
    mark = uuid.uuid4().hex
    search_path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(search_path),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        # As on a machine without a GPU. ACCELERATE_USE_CPU would hide a script that forgets
        # Accelerator(cpu=True), whose two ranks would each believe to be alone.
        "CUDA_VISIBLE_DEVICES": "",
        **(env or {}),
        _MARK: mark,
    }
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            cwd=cwd or ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Job(name, process, mark, log)


def _mark_of(process: psutil.Process) -> str | None:
    """The job mark in a process's environment; None for a process that is gone or not ours."""
    try:
        mark: str | None = process.environ().get(_MARK)
    except (psutil.Error, OSError):
        return None
    return mark
