"""A run's kept payloads in place of a donor: the same weights again, or a clear refusal."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from tests.unit.jobs import ReceiverAlone, StartReceiver, weights_of
from toolkit.bridge.errors import BridgeError
from toolkit.bridge.ledger import Entry, trail_path
from toolkit.bridge.payload import parse_record, write_record
from toolkit.bridge.replay import KeptPayloads
from toolkit.parameters import same_bits

OVERFLOW = 1e38  # a finite loss, but not times the scale


def take_step(job: ReceiverAlone, answer: float | str | None, factor: float = 1.0) -> bool:
    """One window; the donor answers with this value everywhere, with "skip", or not at all."""
    with job.accelerator.accumulate(job.model):
        job.backward(factor=factor)
        if isinstance(answer, float):
            job.donate(job.constant(answer))
        elif answer is not None:
            job.donate(None, kind="skip")
        job.receiver.inject()
        job.optimizer.step()
        job.optimizer.zero_grad()
        return job.receiver.commit()


def assert_same(job: ReceiverAlone, expected: dict[str, Tensor]) -> None:
    for name, tensor in weights_of(job.network).items():
        assert same_bits(tensor, expected[name]), name


ANSWERS = (0.3, "skip", -0.7, None)


@dataclasses.dataclass
class Run:
    """A run of four steps that kept its payloads."""

    directory: Path
    weights: dict[str, Tensor]
    fates: dict[str, int]

    def kept(self, sequence: int) -> Path:
        return self.directory / "bridge" / "donor" / "kept" / f"{sequence:010d}.safetensors"


@pytest.fixture
def run(start_receiver: StartReceiver) -> Run:
    job = start_receiver("runs", keep_payloads=True)
    for answer in ANSWERS:
        assert take_step(job, answer)
    assert job.receiver.steps_alone == 2
    job.receiver.close()
    return Run(job.receiver.run_dir, weights_of(job.network), job.receiver.fates())


def listing(directory: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.stat().st_mtime_ns) for path in directory.rglob("*"))


def test_that_a_replay_ends_in_the_same_weights_and_leaves_the_run_alone(
    start_receiver: StartReceiver, run: Run
) -> None:
    assert [path.name for path in run.kept(0).parent.iterdir()] == [
        run.kept(0).name,
        run.kept(2).name,
    ]
    before = listing(run.directory)
    replay = start_receiver("replay", replay=run.directory)
    for _ in ANSWERS:
        assert replay.step()

    assert_same(replay, run.weights)
    assert replay.receiver.steps_alone == 2
    assert replay.receiver.fates() == run.fates
    assert replay.receiver.evidence({})["departed_at"] is None
    assert replay.receiver.transport.sequences("receiver") == [], "weights for nobody"
    replay.receiver.close()
    assert listing(run.directory) == before


def test_that_staleness_is_as_it_was(start_receiver: StartReceiver) -> None:
    job = start_receiver("runs", keep_payloads=True, max_staleness=1)
    for answer in (None, 0.3, None):  # the second answers the weights of step 0
        take_step(job, answer)
    job.receiver.close()
    replay = start_receiver("replay", replay=job.receiver.run_dir)
    staleness = []
    for _ in range(3):
        replay.step()
        staleness.append(replay.receiver.metrics.get("bridge/staleness donor (receiver steps)"))

    assert staleness == [None, 1.0, None]
    assert_same(replay, weights_of(job.network))


def test_that_a_window_that_a_loss_scaler_skipped_is_skipped_again(
    start_receiver: StartReceiver,
) -> None:
    factors = (1.0, OVERFLOW, 1.0, 1.0)  # one payload serves the second window and the third
    answers = (0.3, -0.7, None, 0.1)
    job = start_receiver("runs", keep_payloads=True, init_scale=2.0**10)
    happened = [take_step(job, *both) for both in zip(answers, factors, strict=True)]
    assert happened == [True, False, True, True]
    assert job.receiver.steps_alone == 0
    job.receiver.close()
    replay = start_receiver("replay", replay=job.receiver.run_dir, init_scale=2.0**10)

    assert [replay.step(factor) for factor in factors] == happened
    assert replay.receiver.completed_windows == 4
    assert_same(replay, weights_of(job.network))


def test_that_a_resumed_run_is_replayed_from_its_first_step(
    start_receiver: StartReceiver, tmp_path: Path
) -> None:
    job = start_receiver("runs", keep_payloads=True)
    take_step(job, 0.3)
    job.accelerator.save_state(str(tmp_path / "checkpoint"))
    take_step(job, -5.0)  # lost: killed after it
    job.receiver._stop()
    settings = {"keep_payloads": True, "resume_from_checkpoint": tmp_path / "checkpoint"}
    resumed = start_receiver("runs", **settings)
    resumed.accelerator.load_state(str(tmp_path / "checkpoint"))
    resumed.receiver.transport.reject("donor", 1, "digest", "this time another payload comes")
    resumed.published = 2
    take_step(resumed, 0.9)
    resumed.receiver.close()
    run_dir = resumed.receiver.run_dir
    replay = start_receiver("replay", replay=run_dir)
    for _ in range(2):
        replay.step()

    assert KeptPayloads(run_dir).attempt == 2
    assert [entry.sequence for entry in KeptPayloads(run_dir).applied] == [0, 2]
    assert_same(replay, weights_of(resumed.network))
    jobs = (job, resumed, replay)
    initial = {each.receiver.evidence({})["initial_weights_digest"] for each in jobs}
    assert len(initial) == 1
    assert initial != {""}


def test_that_a_replay_says_after_which_step_its_weights_are_others(
    start_receiver: StartReceiver, run: Run
) -> None:
    replay = start_receiver("replay", replay=run.directory)
    replay.step(factor=1.5)
    assert replay.receiver.evidence({})["departed_at"] is None
    replay.step()
    replay.step()  # takes the second payload, which names the weights that it was taken at

    assert replay.receiver.evidence({})["departed_at"] == 2


def rewrite(path: Path) -> None:
    """Put other numbers into a payload, with a digest that fits them."""
    record = parse_record(path.read_bytes())
    tensors = {name: tensor + 1e-12 for name, tensor in record.tensors.items()}
    path.unlink()
    write_record(path, record.header, tensors)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("meddle", "words"),
    [
        (flip, r"payload 2 \(.*\) was changed: the tensors' digest does not match"),
        (rewrite, r"payload 2 \(.*\) is not the one that was applied: .* the ledger has [0-9a-f]+"),
        (os.unlink, "payload 2 was applied but is not kept: .*needs --keep_payloads"),
    ],
)
def test_that_a_payload_that_was_meddled_with_is_refused(
    start_receiver: StartReceiver, run: Run, meddle: Callable[[Path], None], words: str
) -> None:
    meddle(run.kept(2))
    with pytest.raises(BridgeError, match=words):
        KeptPayloads(run.directory).read("donor", 2)
    replay = start_receiver("replay", replay=run.directory)
    replay.step()
    replay.step()
    with pytest.raises(BridgeError, match=words):
        replay.step()


def test_that_what_is_no_run_is_refused(start_receiver: StartReceiver, tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match="is no run of the bridge"):
        start_receiver("replay", replay=tmp_path / "absent" / "0001")
    assert not (tmp_path / "replay").exists()


def test_that_what_a_replay_needs_outlives_a_crash_of_the_machine(
    start_receiver: StartReceiver, synced: list[int]
) -> None:
    job = start_receiver("runs", keep_payloads=True)
    take_step(job, 0.3)
    kept = job.receiver.transport.kept_path("donor", 0)

    for path in (trail_path(job.receiver.run_dir, 1), kept, kept.parent):
        assert path.stat().st_ino in synced, path


def test_that_fates_are_in_the_order_of_the_run(run: Run) -> None:
    digests = [
        parse_record(run.kept(sequence).read_bytes()).header.tensors_digest for sequence in (0, 2)
    ]
    assert KeptPayloads(run.directory).path == [
        Entry("donor", 0, "applied", 0, digest=digests[0]),
        Entry("donor", 1, "skipped", 1),
        Entry("donor", 2, "applied", 2, digest=digests[1]),
    ]
