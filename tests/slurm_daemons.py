"""A Slurm cluster of a test's own: real daemons, whose four nodes are all this machine.

They run in a network and with a hosts file of their own, keep all they write in one directory, and
are killed at the end with whatever they have started.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.namespaces import known_names, own_network
from tests.launching import Job, Launcher
from tests.recipes.running import wait_until
from tests.slurm import MACHINES, SCRIPT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
COMMAND_SECONDS = 60.0  # for a hang only
SEARCH_PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
NODES = {f"node{n}": f"10.77.0.{n}" for n in range(1, 2 * MACHINES + 1)}
CPUS = 2  # of each node, all for one rank
# Where Slurm is not told otherwise, it is as its makers deliver it. The ports are in a network of
# their own, the GPUs are none.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
TaskPluginParam=cores
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
NodeName=node[1-{nodes}] NodeHostname={host} NodeAddr=node[1-{nodes}] Port=[7001-700{nodes}] \
CPUs={cpus} Gres=gpu:1
PartitionName=main Nodes=ALL Default=YES
"""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def slurm(*words: object, env: Mapping[str, str]) -> str:
    """What one of Slurm's commands prints.

    Raises:
        AssertionError: if it fails, with what it said.
    """
    command = [str(word) for word in words]
    done = subprocess.run(
        command,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


@dataclass
class BatchJob:
    """A job that Slurm runs.

    Args:
        submission: the ``sbatch`` that submitted it, whose mark its processes carry.
        number: Slurm's number of it.
        log: the file with the output of its script and of all ranks.
        env: of Slurm's commands.
    """

    submission: Job
    number: int
    log: Path
    env: Mapping[str, str]

    def wait(self, timeout: float, *, check: bool = True) -> str:
        """Wait until the job has ended and none of its processes is left.

        Args:
            timeout: in seconds.
            check: whether any end but a good one is an error.

        Returns:
            Its state, as Slurm calls it.

        Raises:
            AssertionError: if it did not end in time, or badly and ``check`` is set.
        """
        deadline = time.monotonic() + timeout
        while (state := self.state()) not in ENDED or self.submission.processes():
            assert time.monotonic() < deadline, f"still runs after {timeout} s:\n{self.output()}"
            time.sleep(0.1)
        assert not check or state == "COMPLETED", f"{state}\n{self.output()}"
        return state

    def state(self) -> str:
        """``RUNNING``, ``COMPLETED`` and so on."""
        shown = slurm("scontrol", "--oneliner", "show", "job", self.number, env=self.env)
        return shown.partition(" JobState=")[2].partition(" ")[0]

    def cancel(self, *options: object) -> None:
        """``scancel``."""
        slurm("scancel", *options, self.number, env=self.env)

    def output(self) -> str:
        """What the script and all ranks have printed so far, both streams."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


@dataclass
class SlurmCluster:
    """Four nodes, so two jobs on two machines each.

    Args:
        directory: where the jobs' output goes.
        launcher: of the test.
        env: of Slurm's commands.
    """

    directory: Path
    launcher: Launcher
    env: Mapping[str, str]

    def submit(self, recipe: str, *flags: object, **env: str) -> BatchJob:
        """``sbatch accelerate_configs/slurm.sh recipe flags...``, with one rank on a machine."""
        size = ["--gpus-per-node=1", f"--cpus-per-task={CPUS}"]
        options = ["--parsable", f"--output={self.directory}/%j.log", *size]
        command = ["sbatch", *options, str(SCRIPT), recipe, *map(str, flags)]
        name = f"sbatch-{Path(recipe).stem}"
        submission = self.launcher.start(name, command, env={**self.env, **env})
        submission.wait(COMMAND_SECONDS)
        number = int(submission.output())
        return BatchJob(submission, number, self.directory / f"{number}.log", self.env)


@contextlib.contextmanager
def slurm_cluster(directory: Path, launcher: Launcher) -> Iterator[SlurmCluster]:
    """A cluster that is ready for jobs; at the end nothing of it is left.

    Where it cannot be, the test is skipped.

    Args:
        directory: to be made, for configuration, state and logs.
        launcher: of the test.
    """
    missing = [name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]
    if missing:
        pytest.skip(f"needs Slurm and munge, there is no {' '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("needs to be root, for daemons of Slurm and namespaces")
    directory.mkdir()
    host = socket.gethostname().partition(".")[0]
    names = {"localhost": "127.0.0.1", host: NODES["node1"], **NODES}
    env = {"SLURM_CONF": f"{directory}/slurm.conf", "PATH": SEARCH_PATH}
    with own_network([*NODES.values()]), known_names(names, directory / "hosts"):
        _configure(directory, host)
        munged = [f"--{of}-file={directory}/munge.{of}" for of in ("key", "pid", "seed", "log")]
        munged += [f"--socket={directory}/munge.socket", "--foreground", "--force"]
        daemons = [launcher.start("munged", ["munged", *munged], env=env)]
        daemons += [launcher.start("slurmctld", ["slurmctld", "-D"], env=env)]
        daemons += [launcher.start(node, ["slurmd", "-D", "-N", node], env=env) for node in NODES]

        def is_ready() -> bool:
            for daemon in daemons:
                assert daemon.is_running(), f"{daemon.name}: {daemon.output()}"
            with contextlib.suppress(AssertionError):  # nobody answers yet
                nodes = slurm("sinfo", "--noheader", "--format=%t %D", env=env)
                return nodes.split() == ["idle", str(len(NODES))]
            return False

        wait_until(is_ready, "the nodes")
        yield SlurmCluster(directory, launcher, env)


def _configure(directory: Path, host: str) -> None:
    for name in ("state", *NODES):
        (directory / name).mkdir()
    key = directory / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    (directory / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    settings = CONFIGURATION.format(directory=directory, host=host, nodes=len(NODES), cpus=CPUS)
    (directory / "slurm.conf").write_text(settings)
