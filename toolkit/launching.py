"""Launch recipes with ``accelerate launch`` as a user does, and follow them to their end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.progress import Progress

_TQDM = re.compile(r"(\d+)(?:/(\d+)|it) \[")
_LOG_TAIL_LINES = 40
_STOP_SECONDS = 10.0
_started: list[LaunchedJob] = []  # within terminable()


class JobFailedError(RuntimeError):
    """A launched job ended with an error; the message holds the end of its output."""


@dataclasses.dataclass(slots=True)
class LaunchedJob:
    """One ``accelerate launch`` process with its log file and results directory."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    output_dir: Path

    def progress(self) -> tuple[int, int | None]:
        """Steps done and, where the job knows, steps planned, from its own progress bar."""
        found = _TQDM.findall(self.log.read_text(errors="replace")[-2000:])
        done, planned = found[-1] if found else (0, "")
        return int(done), int(planned) if planned else None

    def check(self) -> bool:
        """Whether the job has ended; raises :class:`JobFailedError` if it failed."""
        status = self.process.poll()
        if status:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])
            raise JobFailedError(f"{self.name} ended with status {status}; {self.log}:\n{tail}")
        return status == 0

    def results(self) -> dict[str, object]:
        """The job's ``results.json``."""
        content: dict[str, object] = json.loads((self.output_dir / "results.json").read_bytes())
        return content

    def stop(self) -> None:
        """Ask the job to end if it still runs, and see that it does, within 10 s."""
        if self.process.poll() is not None:
            return
        deadline = time.monotonic() + _STOP_SECONDS
        with contextlib.suppress(ProcessLookupError):  # nobody of its group is left
            os.killpg(self.process.pid, signal.SIGTERM)
            while time.monotonic() < deadline:
                self.process.poll()  # the launcher may end before what it has launched
                os.killpg(self.process.pid, 0)
                time.sleep(0.02)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def new_directory(runs_dir: Path, name: str) -> Path:
    """Make ``<runs_dir>/<name>-NNNN`` of the next free number."""
    for number in range(1, 10_000):
        root = runs_dir.absolute() / f"{name}-{number:04d}"
        try:
            root.mkdir(parents=True)
        except FileExistsError:
            continue
        return root
    raise FileExistsError(f"{runs_dir} holds 9,999 of {name} already; delete some")


def bundled(name: str) -> Path:
    """Where ``recipes`` or ``accelerate_configs`` lie: in the package, or in the checkout."""
    package = Path(__file__).resolve().parent
    for directory in (package / name, package.parent / name):
        if directory.is_dir():
            return directory
    raise FileNotFoundError(f"{name!r} is neither in {package} nor in {package.parent}")


def launch(
    recipe: str | Path,
    name: str,
    output_dir: Path,
    flags: Sequence[object],
    num_processes: int = 1,
    *,
    on_gpu: bool = False,
    num_threads: int = 1,
    cwd: Path | None = None,
) -> LaunchedJob:
    """Start one recipe; its output goes to ``<output_dir>.log``.

    Args:
        recipe: its name, without ``.py``; or the path of a script.
        name: of the job, for people.
        output_dir: where it is told to write, or writes by itself.
        flags: of the recipe.
        num_processes: ranks.
        on_gpu: whether it may use GPUs, one for each rank.
        num_threads: of each rank on the CPU.
        cwd: its working directory; by default this process's.
    """
    if on_gpu:
        config = "single_gpu" if num_processes == 1 else "multi_gpu"
        options = [f"--config_file={bundled('accelerate_configs') / config}.yaml"]
        options += [f"--num_processes={num_processes}"]
    elif num_processes == 1:
        options = ["--cpu", "--num_processes=1", "--num_machines=1", "--dynamo_backend=no"]
        options += ["--mixed_precision=no"]
    else:
        options = [f"--config_file={bundled('accelerate_configs') / 'cpu_2proc.yaml'}"]
        options += [f"--num_processes={num_processes}"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options]
    script = recipe if isinstance(recipe, Path) else bundled("recipes") / f"{recipe}.py"
    command += [str(script), *map(str, flags)]
    return start(command, name, output_dir, on_gpu=on_gpu, num_threads=num_threads, cwd=cwd)


def start(
    command: Sequence[str],
    name: str,
    output_dir: Path,
    *,
    on_gpu: bool = False,
    num_threads: int = 1,
    cwd: Path | None = None,
) -> LaunchedJob:
    """Start any command as a job; the rest is as for :func:`launch`."""
    log = output_dir.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    for variable in ("MASTER_ADDR", "MASTER_PORT"):  # of this process's own launch
        environment.pop(variable, None)
    if not on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with log.open("wb") as stream, _signals_deferred():
        process = subprocess.Popen(
            [*command],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=cwd,
            env=environment,
        )
        job = LaunchedJob(name, process, log, output_dir)
        _started.append(job)
    return job


@contextlib.contextmanager
def _signals_deferred() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect at the end: no process is there that nobody knows of."""
    came: list[int] = []

    def defer(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, defer) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for came_first in came[:1]:
            signal.raise_signal(came_first)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """End in an orderly way by SIGTERM too. No job that was started inside outlives it."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    first = len(_started)
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for job in _started[first:]:
            job.stop()
        del _started[first:]


def follow(jobs: Sequence[LaunchedJob], progress: Progress) -> None:
    """Show the jobs' progress until all have ended; stop the others if one fails."""
    tasks = {job.name: progress.add_task(job.name, total=None) for job in jobs}
    running = list(jobs)
    try:
        while running:
            time.sleep(0.1)
            for job in list(running):
                ended = job.check()
                done, planned = job.progress()
                if ended:
                    planned = done  # a donor learns only from the receiver when to end
                progress.update(tasks[job.name], completed=done, total=planned)
                if ended:
                    running.remove(job)
                    progress.stop_task(tasks[job.name])
    finally:
        for job in running:
            job.stop()
