"""That whoever launches jobs leaves none behind, whenever it is interrupted."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

# Interrupts itself while a job is started, or before anybody follows it; prints the job's id first.
_SCRIPT = """
import os, signal, subprocess, sys
from pathlib import Path
from toolkit import launching

number, is_within = int(sys.argv[1]), sys.argv[2] == "within"

class Popen(subprocess.Popen):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        print(self.pid, flush=True)
        if is_within:
            os.kill(os.getpid(), number)

subprocess.Popen = Popen
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
with launching.terminable():
    launching.start([sys.executable, "-c", "import time; time.sleep(600)"], "job", Path("job"))
    os.kill(os.getpid(), number)
"""


@pytest.mark.parametrize("moment", ["within", "after"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_that_no_job_is_left_by_who_is_interrupted_before_it_follows_it(
    tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    command = [sys.executable, "-c", _SCRIPT, str(int(number)), moment]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    job = int(ended.stdout)
    try:
        assert not psutil.pid_exists(job)
    finally:
        if psutil.pid_exists(job):
            psutil.Process(job).kill()
    assert ended.returncode == (-number if number == signal.SIGINT else 128 + number)
