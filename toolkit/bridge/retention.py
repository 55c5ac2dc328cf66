"""Which payloads of a donor a resume may ask for again.

Without checkpoints none: a payload is never needed again once its step is committed. With them,
those from the oldest retained checkpoint on, and all until there is one: a receiver that dies
before begins anew. Accelerate syncs nothing, so a checkpoint counts only once it is complete and
synced here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from toolkit.bridge import files
from toolkit.bridge.runs import CHECKPOINT_FILE
from toolkit.bridge.transport import DirectoryTransport


class CheckpointCursors:
    """The donors' cursors in the checkpoints of one run.

    Args:
        transport: the run's transport.
        run_id: checkpoints of other runs beside them are no concern.
        will_save: whether there will be checkpoints.
    """

    def __init__(self, transport: DirectoryTransport, run_id: str, *, will_save: bool) -> None:
        self._transport, self._run_id, self._will_save = transport, run_id, will_save
        self._acknowledged: dict[str, int] = {}
        self._parents: set[Path] = set()
        self._cursors: list[dict[str, int]] = []  # of each checkpoint, by donor
        self._is_stale = False

    def saved_below(self, parent: Path) -> None:
        """Note that a checkpoint is being saved in a subdirectory of ``parent``."""
        self._parents.add(parent)
        self._is_stale = True

    def acknowledge(self, cursors: Mapping[str, int]) -> None:
        """Tell the donors what they may delete, where that has changed; see :meth:`oldest_needed`.

        Args:
            cursors: the receiver's present ones, by donor.
        """
        for donor, needed in self.oldest_needed(cursors).items():
            if needed > self._acknowledged.get(donor, 0):
                self._transport.acknowledge(donor, needed)
                self._acknowledged[donor] = needed

    def oldest_needed(self, cursors: Mapping[str, int]) -> dict[str, int]:
        """By donor, the number below which no payload is needed again.

        Call it only when no save is under way: checkpoints saved since the last call are taken
        as complete, and synced to the disk.

        Args:
            cursors: the receiver's present ones, by donor.
        """
        if self._is_stale:
            self._cursors = [
                cursor for parent in self._parents for cursor in self._synced_cursors(parent)
            ]
            self._is_stale = False
        if self._will_save and not self._cursors:
            return dict.fromkeys(cursors, 0)
        return {
            # A donor that a checkpoint does not know joined after it: all of it may be needed.
            donor: min([cursor, *(saved.get(donor, 0) for saved in self._cursors)])
            for donor, cursor in cursors.items()
        }

    def _synced_cursors(self, parent: Path) -> list[dict[str, int]]:
        cursors = []
        for path in parent.glob(f"*/{CHECKPOINT_FILE}"):
            try:
                content = json.loads(path.read_bytes())
                if content["run_id"] != self._run_id or content["job"] != "receiver":
                    continue
                saved = {d: int(state["cursor"]) for d, state in content["donors"].items()}
            except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
                continue  # deleted while we look, or cut short by a kill: nobody resumes from it
            files.fsync_tree(path.parent)
            cursors.append(saved)
        return cursors
