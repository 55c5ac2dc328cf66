"""The files of a run at one moment: what they are, and how large."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from toolkit.bridge.files import TEMPORARY_PREFIX

# What a publication, safetensors' own writer and the test of a new stream leave when killed.
_TEMPORARY = (TEMPORARY_PREFIX, ".tmp", "probe-")


class Listing:
    """All that lies below a directory, but for directories. No symbolic link is followed.

    Args:
        root: the directory; may be absent.

    Attributes:
        statuses: by path.
        errors: of directories that could not be listed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.statuses: dict[str, os.stat_result] = {}
        self.errors: list[OSError] = []
        directories = [root]
        while directories:
            try:
                with os.scandir(directories.pop()) as entries:
                    for entry in entries:
                        self._add(entry, directories)
            except FileNotFoundError:  # deleted meanwhile
                continue
            except OSError as error:
                self.errors.append(error)

    def _add(self, entry: os.DirEntry[str], directories: list[Path]) -> None:
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(status.st_mode):
            directories.append(Path(entry.path))
        else:
            self.statuses[entry.path] = status

    def special(self) -> list[Path]:
        """Links, pipes, sockets and devices: opening one may block, or lead elsewhere."""
        return sorted(Path(p) for p, s in self.statuses.items() if not stat.S_ISREG(s.st_mode))

    def below(self, directory: Path) -> list[str]:
        """The paths below a directory, in order."""
        return sorted(path for path in self.statuses if path.startswith(f"{directory}{os.sep}"))

    def num_bytes(self, directory: Path) -> int:
        """The size of the files below a directory, those with several names counted once."""
        statuses = (self.statuses[path] for path in self.below(directory))
        return sum({(s.st_dev, s.st_ino): s.st_size for s in statuses}.values())

    def temporary(self) -> dict[Path, int]:
        """The sizes of files that were begun and not finished."""
        return {
            Path(path): status.st_size
            for path, status in sorted(self.statuses.items())
            if os.path.basename(path).startswith(_TEMPORARY)
        }
