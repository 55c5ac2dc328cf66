"""What a running process asks of the file system, as strace sees it."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

# What a file system has to look up or change by name, and reading a directory. Reading an open
# file, or its status, is none.
_METADATA = "%file,getdents64,fchmod,fsync,fdatasync"
_CALL = re.compile(r"^(?:\d+ +)?([a-z0-9_]+)\(")
_OF_AN_OPEN_FILE = "AT_EMPTY_PATH"


def metadata_operations(pid: int, below: Path, seconds: float, log: Path) -> Counter[str]:
    """By system call, how many concern names below a directory.

    Args:
        pid: of the process, all threads of which are watched.
        below: the directory.
        seconds: for how long.
        log: the file for what strace says.
    """
    watch = subprocess.Popen(
        ["strace", "-f", "-y", "-s", "300", "-e", f"trace={_METADATA}", "-o", log, "-p", str(pid)],
        stderr=subprocess.PIPE,
    )
    time.sleep(seconds)
    watch.send_signal(signal.SIGINT)
    _, errors = watch.communicate(timeout=60)
    assert b"attached" in errors, errors.decode()
    calls: Counter[str] = Counter()
    for line in log.read_text(errors="replace").splitlines():
        call = _CALL.match(line)
        if call and str(below) in line and _OF_AN_OPEN_FILE not in line:
            calls[call[1]] += 1
    return calls
