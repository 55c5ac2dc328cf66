"""Donors in every rhythm: however payloads come, each number has one fate, and the sums add up."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.streams import Bridge
from toolkit.bridge import inbox as inbox_module
from toolkit.bridge.inbox import MISSING_SECONDS
from toolkit.bridge.transport import DirectoryTransport

NUM_STEPS = 40
NUM_ALIENS = 3


class Rhythm:
    """A donor's stream in which things go wrong at random, and a receiver that steps on."""

    def __init__(self, bridge: Bridge, seed: int) -> None:
        self.bridge, self.random = bridge, random.Random(seed)
        self.lost: set[int] = set()

    def publish(self) -> None:
        """One number: mostly a payload, sometimes a late, lost, damaged or doubled one."""
        bridge, step = self.bridge, self.bridge.step
        kind = self.random.choices(
            ["good", "late", "skip", "lost", "damaged", "copied", "superseded"],
            [12, 2, 1, 1, 1, 1, 1],
        )[0]
        if kind == "copied":  # the bytes of an earlier number, as by a replay
            earlier = bridge.transport.sequences("donor")
            if earlier:
                source = bridge.transport.path("donor", self.random.choice(earlier))
                shutil.copyfile(source, bridge.transport.path("donor", bridge.published))
                bridge.published += 1
            return
        at = max(0, step - self.random.randint(1, 5)) if kind == "late" else step
        changes: dict[str, Any] = {"kind": "skip" if kind == "skip" else "gradient"}
        if kind == "superseded":
            changes["weights_digest"] = "of an earlier attempt"
        number = bridge.donate(at, **changes)
        if kind == "lost":
            bridge.transport.path("donor", number).unlink()
            self.lost.add(number)
        if kind == "damaged":
            bridge.damage(number)

    def step(self) -> None:
        """One step of the receiver, which waits, and gives the donor up in the end."""
        bridge = self.bridge
        bridge.now += MISSING_SECONDS
        for _ in range(8):
            if (verdict := bridge.look()) is not None:
                bridge.settle(verdict)
                return
            self.check()
            bridge.now += MISSING_SECONDS
        while (verdict := bridge.inbox.give_up(bridge.step, bridge.peer)) is None:
            bridge.now += MISSING_SECONDS
        bridge.settle(verdict)

    def check(self) -> dict[str, int]:
        """Each number of the stream has one fate or is pending; how many have which fate."""
        inbox, published = self.bridge.inbox, self.bridge.published
        fates = self.bridge.ledger.counts("donor")
        assert sum(fates.values()) == inbox.num_settled()
        noticed = set(self.bridge.transport.rejected("donor"))
        unnoticed = {number for number in self.lost - noticed if number >= inbox.cursor}
        assert inbox.num_settled() + inbox.pending() + len(unnoticed) == published
        return fates


@pytest.mark.faults
@pytest.mark.parametrize("per_step", [10.0, 3.0, 1.0, 0.1], ids=lambda rate: f"{rate:g} a step")
@pytest.mark.parametrize("max_staleness", [0, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_ledger_adds_up_in_every_rhythm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_step: float, max_staleness: int, seed: int
) -> None:
    bridge = Bridge(DirectoryTransport(tmp_path), max_staleness=max_staleness)
    monkeypatch.setattr(inbox_module, "time", SimpleNamespace(monotonic=lambda: bridge.now))
    rhythm = Rhythm(bridge, seed)
    for number in range(NUM_ALIENS):
        (tmp_path / "donor" / "records" / f"alien-{number}").write_bytes(b"of somebody else")
    due = 0.0
    for _ in range(NUM_STEPS):
        due += per_step * rhythm.random.choice([0, 0, 1, 3])  # bursts and pauses, 1 on average
        while due >= 1:
            rhythm.publish()
            due -= 1
        rhythm.step()
        rhythm.check()
    end = bridge.donate(bridge.step, kind="end")
    bridge.published -= 1  # an end is no payload
    while bridge.inbox.cursor <= end:
        rhythm.step()
    fates = rhythm.check()
    assert bridge.inbox.cursor == end + 1
    assert bridge.inbox.pending() == 0
    assert fates["applied"] > 0
    assert fates["rejected"] > 0 or per_step < 1
    assert len(bridge.transport.alien_names("donor")) == NUM_ALIENS
