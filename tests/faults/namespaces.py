"""File systems and networks of a test's own, in namespaces that vanish with its process.

The test's main thread moves into a private mount namespace, which the jobs that it launches
inherit: nobody else sees the mounts, and they end with the last process in it, whatever ends that.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18
_LIBC = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _run(*command: object) -> str:
    return subprocess.run(
        [str(word) for word in command], check=True, capture_output=True, text=True
    ).stdout.strip()


@contextlib.contextmanager
def private_mounts() -> Iterator[None]:
    """What is mounted meanwhile is seen by this thread and what it starts only.

    Where the machine does not allow it, the test is skipped.
    """
    before = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)
    try:
        try:
            _check(_LIBC.unshare(_CLONE_NEWNS), "unshare(CLONE_NEWNS)")
        except OSError as error:
            pytest.skip(f"needs the right to make a mount namespace (root): {error}")
        here = os.getcwd()
        try:
            _check(_LIBC.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "private /")
            yield
        finally:
            _check(_LIBC.setns(before, _CLONE_NEWNS), "setns")
            os.chdir(here)
    finally:
        os.close(before)


@contextlib.contextmanager
def mounted(target: Path, *options: object) -> Iterator[Path]:
    """Mount something at ``target``, in private mounts; skip where that is not allowed."""
    target.mkdir(parents=True, exist_ok=True)
    try:
        _run("mount", *options, target)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"needs the right to mount {options}: {getattr(error, 'stderr', error)}")
    try:
        yield target
    finally:
        _run("umount", "-l", target)


@contextlib.contextmanager
def known_names(addresses: Mapping[str, str], file: Path) -> Iterator[None]:
    """Host names that resolve as given, in private mounts.

    Args:
        addresses: of the names.
        file: to be made, which stands in the place of ``/etc/hosts``.
    """
    file.write_text("".join(f"{address} {name}\n" for name, address in addresses.items()))
    with private_mounts():
        _run("mount", "--bind", file, "/etc/hosts")  # until the last process in there has ended
        yield


@contextlib.contextmanager
def small_disk(target: Path, mib: int) -> Iterator[Path]:
    """A memory file system of so many MiB."""
    with private_mounts(), mounted(target, "-t", "tmpfs", "-o", f"size={mib}m", "none") as path:
        yield path


@contextlib.contextmanager
def loop_disk(target: Path, mib: int) -> Iterator[Path]:
    """An ext4 file system in a file."""
    image = target.with_name(f"{target.name}.ext4")
    with image.open("wb") as file:
        file.truncate(mib * 2**20)
    try:
        _run("mkfs.ext4", "-q", image)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"needs mkfs.ext4: {error}")
    with private_mounts(), mounted(target, "-o", "loop", image) as path:
        yield path


def freeze(directory: Path, seconds: float) -> None:
    """Let every write to a file system stand still for so long.

    A process of its own thaws it, so that it does not stay frozen if this one is killed.
    """
    script = 'fsfreeze -f "$1" && sleep "$2"; fsfreeze -u "$1"'
    command = ["sh", "-c", script, "sh", str(directory), str(seconds)]
    subprocess.run(command, check=True, start_new_session=True)


def remount(directory: Path, mode: str) -> None:
    """Make a file system read-only (``ro``), which waits for open files, or writable (``rw``)."""
    deadline = time.monotonic() + 60
    while True:
        try:
            _run("mount", "-o", f"remount,{mode}", directory)
        except subprocess.CalledProcessError:
            if time.monotonic() > deadline:
                raise
            continue
        return


def fill(directory: Path) -> Path:
    """Take all the space that is left there; the file that takes it."""
    ballast = directory / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        for size in (2**20, 2**12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return ballast


@dataclass(frozen=True)
class Host:
    """A network of its own, with one link to the other host.

    Args:
        namespace: an open descriptor, which keeps it alive.
        address: of its end of the link.
        interface: the name of that end.
    """

    namespace: int
    address: str
    interface: str

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """What this thread starts meanwhile is on that host."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _check(_LIBC.setns(self.namespace, _CLONE_NEWNET), "setns")
            yield
        finally:
            _check(_LIBC.setns(before, _CLONE_NEWNET), "setns")
            os.close(before)

    def cut_off(self) -> None:
        """Take its link down: nothing arrives any more, and nobody is told."""
        with self.here():
            _run("ip", "link", "set", self.interface, "down")


def _new_network() -> int:
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _check(_LIBC.unshare(_CLONE_NEWNET), "unshare(CLONE_NEWNET)")
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    finally:
        _check(_LIBC.setns(before, _CLONE_NEWNET), "setns")
        os.close(before)


@contextlib.contextmanager
def own_network(addresses: Sequence[str]) -> Iterator[None]:
    """What this thread starts meanwhile reaches only itself, and finds every port free.

    Whatever is left of it at the end is killed, daemons included.

    Where the machine does not allow it, the test is skipped.

    Args:
        addresses: of this machine in there; with loopback alone no name would resolve.
    """
    try:
        host = Host(_new_network(), addresses[0], "lo")
    except OSError as error:
        pytest.skip(f"needs the right to make a network namespace (root): {error}")
    try:
        with host.here():
            _run("ip", "link", "set", host.interface, "up")
            for address in addresses:
                _run("ip", "address", "add", f"{address}/32", "dev", host.interface)
            yield
    finally:
        _kill_all_in(host.namespace)
        os.close(host.namespace)


def _kill_all_in(network: int) -> None:
    inode = os.fstat(network).st_ino

    def left() -> Iterator[int]:
        for pid in psutil.pids():
            with contextlib.suppress(OSError):  # it has ended
                if os.stat(f"/proc/{pid}/ns/net").st_ino == inode:
                    yield pid

    deadline = time.monotonic() + 60
    while pids := list(left()):
        assert time.monotonic() < deadline, f"survive SIGKILL: {pids}"
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts on one wire; they are gone when no process of theirs is left.

    Where the machine does not allow it, the test is skipped.
    """
    opened: list[int] = []
    try:
        try:
            opened += [_new_network() for _ in range(2)]
            hosts = [Host(ns, f"10.77.0.{n}", f"host{n}") for n, ns in enumerate(opened, 1)]
            with hosts[1].here(), subprocess.Popen(["cat"], stdin=subprocess.PIPE) as inside:
                with hosts[0].here():
                    _run(
                        *("ip", "link", "add", hosts[0].interface, "type", "veth"),
                        *("peer", "name", hosts[1].interface, "netns", inside.pid),
                    )
                assert inside.stdin is not None
                inside.stdin.close()
            for host in hosts:
                with host.here():
                    _run("ip", "address", "add", f"{host.address}/24", "dev", host.interface)
                    _run("ip", "link", "set", "lo", "up")
                    _run("ip", "link", "set", host.interface, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs the right to make network namespaces (root) and ip: {error}")
        yield hosts[0], hosts[1]
    finally:
        for descriptor in opened:
            os.close(descriptor)
