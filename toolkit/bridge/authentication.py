"""Optional authentication: with a key, a job believes only what a job of its run has written.

HMAC-SHA256 (RFC 2104) over a context, the run's id and the content. The context is ``record``, or
the name of a file below the run's bridge directory, so that the signature of one thing stands for
no other. The key itself is kept here alone: it is in no message, file, ``repr`` or pickle.

Not signed are a job's checkpoints, results and ledger, which no other job reads.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from toolkit.bridge.errors import BridgeError, PayloadError

logger = logging.getLogger(__name__)

KEY_VARIABLE = "GRADIENT_BRIDGE_KEY"
KEY_SOURCES = f"{KEY_VARIABLE} in the environment, or --key_file"
MIN_KEY_BYTES, MAX_KEY_BYTES = 16, 4096
_MARK = b"hmac-sha256 "  # what a signed file begins with; its signature and a line feed follow


class Signer:
    """Signs what this job writes, and tells what a job of the same run has written.

    Args:
        key: shared by the run's jobs; None signs nothing, and believes what is not signed.
        run_id: of the run; empty only for what founds one.
    """

    __slots__ = ("_key", "_run_id")

    def __init__(self, key: bytes | None = None, run_id: str = "") -> None:
        self._key, self._run_id = key, run_id

    def __repr__(self) -> str:
        return f"Signer({'with' if self.has_key else 'without'} a key, run_id={self._run_id!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a signer may hold a key, which is not to be pickled or copied")

    @property
    def run_id(self) -> str:
        """Of the run whose files it believes."""
        return self._run_id

    @property
    def has_key(self) -> bool:
        """Whether it signs, and believes nothing else."""
        return self._key is not None

    def of_run(self, run_id: str) -> Signer:
        """The signer of one run's files, which believes no file of another run."""
        return Signer(self._key, run_id)

    def sign(self, context: str, content: bytes) -> str:
        """The signature of ``content``, which has this meaning only; in hexadecimal digits."""
        assert self._key is not None
        place = f"{context}\0{self._run_id}\0".encode(errors="surrogateescape")
        return hmac.digest(self._key, place + content, "sha256").hex()

    def check(self, context: str, content: bytes, signature: str | None) -> None:
        """Refuse what was not signed, or with another key, for another run or meaning.

        Args:
            context: what ``content`` is taken for.
            content: what was signed.
            signature: as it was found; None for none.

        Raises:
            PayloadError: if this signer does not believe it.
        """
        detail = None
        if not self.has_key:
            if signature is not None:
                detail = f"it is signed, but no key is given here ({KEY_SOURCES})"
        elif signature is None:
            detail = "it is not signed, but a key is given here"
        elif not hmac.compare_digest(
            self.sign(context, content).encode(), signature.encode(errors="surrogatepass")
        ):
            detail = "it was signed with another key or for another place or run, or changed since"
        if detail is not None:
            raise PayloadError("unauthenticated", detail)

    def seal(self, name: str, content: bytes) -> bytes:
        """What the file ``name`` must hold to be believed; ``content`` itself without a key."""
        if not self.has_key:
            return content
        return _MARK + self.sign(name, content).encode() + b"\n" + content

    def unseal(self, name: str, data: bytes) -> bytes:
        """The content of the file ``name``; nothing of it is parsed before it is believed.

        Raises:
            PayloadError: as :meth:`check`.
        """
        signature, content = None, data
        if data.startswith(_MARK):
            head, _, content = data[len(_MARK) :].partition(b"\n")
            signature = head.decode("latin-1")
        self.check(name, content, signature)
        return content


UNSIGNED = Signer()


def load_key(
    key_file: str | Path | None, environment: Mapping[str, str] = os.environ
) -> bytes | None:
    """The key that this job was given; None if none.

    Line feeds at its end do not count, so that a file may hold what the environment holds.

    Args:
        key_file: a file that holds it and nothing else.
        environment: where ``GRADIENT_BRIDGE_KEY`` is looked for.

    Raises:
        BridgeError: for a file that others may read or that cannot be read, a key that is too
            short or too long, or two that differ.
    """
    keys = {}
    if (variable := environment.get(KEY_VARIABLE)) is not None:
        keys[KEY_VARIABLE] = os.fsencode(variable)
    if key_file is not None:
        keys[f"key file {key_file}"] = _read_key_file(Path(key_file))
    keys = {source: key.rstrip(b"\r\n") for source, key in keys.items()}
    for source, key in keys.items():
        # An empty variable is refused too: a secret that was not filled in is no wish for none.
        if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
            raise BridgeError(
                f"the key in {source} has {len(key)} bytes, and must have {MIN_KEY_BYTES} to "
                f"{MAX_KEY_BYTES}: make one with 'openssl rand -hex 32', or take {source} away"
            )
    if len(set(keys.values())) > 1:
        raise BridgeError(f"{' and '.join(keys)} hold different keys: give one of them")
    return next(iter(keys.values()), None)


def _read_key_file(path: Path) -> bytes:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BridgeError(f"key file {path} is no plain file")
            if status.st_mode & 0o077:
                raise BridgeError(
                    f"key file {path} may be used by others than its owner (mode "
                    f"{stat.S_IMODE(status.st_mode):04o}): chmod 600 {path}"
                )
            return file.read(MAX_KEY_BYTES + 3)  # beyond the limit, a line's end included
    except OSError as error:
        raise BridgeError(
            f"key file {path} cannot be read: {error.strerror}. Give a file of this user (openssl "
            "rand -hex 32 > FILE; chmod 600 FILE)"
        ) from None


def run_mode(signer: Signer) -> int:
    """The mode of a run's directory: with a key, nobody else may put another bridge into it."""
    return 0o755 if signer.has_key else 0o777


def make_bridge_directory(bridge: Path, signer: Signer) -> None:
    """Make the directory that a run's jobs share; with a key it is its owner's, and all below it.

    Raises:
        OSError: if it cannot be made.
    """
    if not signer.has_key:
        bridge.mkdir(exist_ok=True)
        return
    bridge.mkdir(0o700, exist_ok=True)
    if bridge.stat().st_mode & 0o077:
        with contextlib.suppress(PermissionError):
            bridge.chmod(0o700)
    if bridge.stat().st_mode & 0o077:
        logger.warning("others than its owner may use %s, and its mode cannot be changed", bridge)


def warn_of_others(runs_dir: Path) -> None:
    """Say so where others may delete runs, which no key prevents."""
    status = runs_dir.stat()
    may_be_emptied = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
    if may_be_emptied or status.st_uid not in (0, os.geteuid()):
        logger.warning(
            "others may delete or replace whole runs in %s (mode %04o, of user %d): chmod go-w, or "
            "give a directory of your own (--runs_dir)",
            runs_dir, stat.S_IMODE(status.st_mode), status.st_uid,
        )  # fmt: skip
