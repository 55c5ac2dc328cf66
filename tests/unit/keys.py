"""Keys of two runs, and what is signed with them."""

from __future__ import annotations

from pathlib import Path

from toolkit.bridge.authentication import UNSIGNED, Signer

KEY, OTHER_KEY = b"the key of both jobs", b"the key of somebody else"
SIGNER = Signer(KEY, "run")
NOT_THIS_RUNS = [UNSIGNED, Signer(OTHER_KEY, "run"), Signer(KEY, "another run")]


def key_file(tmp_path: Path, content: bytes, mode: int = 0o600) -> Path:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(mode)
    return path
