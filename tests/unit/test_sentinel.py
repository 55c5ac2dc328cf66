"""Alarms about donors that go wrong in silence."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.jobs import ReceiverAlone
from tests.unit.streams import Bridge
from toolkit.bridge.payload import Header, Record
from toolkit.bridge.sentinel import LOSS_SPAN, MEMORY, NORM_FACTOR, PATIENCE, WARM_UP, Sentinel
from toolkit.bridge.transport import DirectoryTransport
from toolkit.inner_products import squared_norm


def record(
    backbone: float | None = 1.0, head: float = 1.0, count: float = 4.0, loss: float | None = None
) -> Record:
    """A payload whose parts have these norms, times the count."""
    parts = {"backbone.w": backbone, "heads.h2.w": head}
    tensors = {
        name: torch.tensor([0.0, value * count])
        for name, value in parts.items()
        if value is not None
    }
    header = Header(
        kind="gradient", run_id="run", job="donor", attempt=1, receiver_step=0,
        weights_digest="", count=count, loss=loss,
    )  # fmt: skip
    return Record(header=header, tensors=tensors, num_bytes=0)


def look(watch: Sentinel, payload: Record) -> tuple[str, ...]:
    before = watch.state()
    alarms = watch.judge(payload)
    assert watch.state() == before, "nothing counts before it is applied"
    watch.remember(payload)
    assert watch.alarms == alarms
    return alarms


def sentinel() -> Sentinel:
    return Sentinel("donor", ["backbone.w"])


@pytest.mark.parametrize(
    ("parts", "alarm"),
    [
        ({"backbone": 0.0, "head": 0.0}, "zero"),
        ({"backbone": None, "head": 0.0}, "zero"),
        ({"head": 0.0}, "idle head"),
        ({"backbone": 0.0}, "idle backbone"),
    ],
)
def test_that_a_part_that_stays_zero_raises_an_alarm(
    parts: dict[str, float], alarm: str, caplog: pytest.LogCaptureFixture
) -> None:
    watch = sentinel()
    raised = [look(watch, record(**parts)) for _ in range(PATIENCE + 2)]
    assert raised == [()] * (PATIENCE - 1) + [(alarm,)] * 3
    assert watch.counts == {alarm: 3}
    assert caplog.text.count("ALARM: the donor: its gradients") == 1, "said where it begins"
    assert look(watch, record()) == ()
    assert look(watch, record(**parts)) == (), "in a row"


def test_that_heads_alone_have_no_idle_backbone() -> None:
    watch = sentinel()
    assert all(look(watch, record(backbone=None)) == () for _ in range(PATIENCE + 2))


def test_that_a_norm_out_of_the_usual_range_raises_an_alarm() -> None:
    watch = sentinel()
    huge = record(backbone=4 * NORM_FACTOR)
    early = [look(watch, huge)]  # nothing is usual yet
    for place in range(WARM_UP):
        assert look(watch, record(backbone=1.0 + place % 4, count=1.0 + place)) == ()
    usual = watch.state()["norms"]
    assert look(watch, huge) == ("norm",)
    assert look(watch, record(backbone=2.2 * NORM_FACTOR)) == ()
    assert early == [()]
    assert len(usual) == WARM_UP + 1
    for _ in range(2 * MEMORY):  # it falls, as gradients do in training: no alarm
        assert look(watch, record(backbone=1e-3, head=1e-3)) == ()
    assert len(watch.state()["norms"]) == MEMORY
    assert look(watch, record()) == ("norm",)


@pytest.mark.parametrize(
    ("slope", "raises"), [(0.0, True), (1e-4, True), (-5e-4, True), (-2e-3, False)]
)
def test_that_a_loss_that_does_not_fall_raises_an_alarm(slope: float, raises: bool) -> None:
    watch = sentinel()
    raised = [
        bool(look(watch, record(loss=2.3 + slope * place + 0.1 * (-1) ** place)))
        for place in range(2 * LOSS_SPAN + 5)
    ]
    assert not any(raised[: 2 * LOSS_SPAN - 1]), "too early to say"
    assert raised[2 * LOSS_SPAN - 1 :] == [raises] * 6


def test_that_its_state_goes_through_json() -> None:
    parts = [{"backbone": 0.0}, {}, {"head": 0.0}, {"loss": 1.0}, {"backbone": 500.0}] * 25
    whole, first = sentinel(), sentinel()
    expected = [look(whole, record(**part)) for part in parts]
    found = [look(first, record(**part)) for part in parts[:60]]
    second = sentinel()
    second.load_state(json.loads(json.dumps(first.state())))
    found += [look(second, record(**part)) for part in parts[60:]]
    assert found == expected
    assert second.state() == whole.state()
    assert "norm" in whole.counts


def test_that_a_scale_that_has_changed_for_good_becomes_the_usual_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watch = sentinel()
    huge = record(backbone=100 * NORM_FACTOR)
    for _ in range(MEMORY):
        look(watch, record())
    for _ in range(WARM_UP - 1):
        assert look(watch, huge) == ("norm",)
    assert look(watch, record()) == (), "in a row"
    for number in range(WARM_UP):
        if number == WARM_UP // 2:
            watch.load_state(json.loads(json.dumps(watch.state())))  # a resume in between
        assert "theirs is the usual one" not in caplog.text
        assert look(watch, huge) == ("norm",)
    assert caplog.text.count("theirs is the usual one") == 1
    assert look(watch, huge) == ()
    assert look(watch, record(backbone=4e3 * NORM_FACTOR)) == ("norm",)


@pytest.mark.parametrize("rejects", [False, True])
def test_that_an_alarm_counts_whether_its_payload_is_applied_or_not(
    tmp_path: Path, rejects: bool, caplog: pytest.LogCaptureFixture
) -> None:
    bridge = Bridge(DirectoryTransport(tmp_path), rejects_alarms=rejects)
    watch = bridge.inbox.sentinel
    for number in range(PATIENCE + 3):
        bridge.donate(at=bridge.step, tensors={"w": torch.zeros(3)})
        if rejects and number >= PATIENCE - 1:
            assert bridge.look() is None
        else:
            bridge.take()
    assert watch.counts == {"zero": 4}
    assert watch.alarms == ("zero",)
    assert caplog.text.count("ALARM: the donor") == 1


def test_that_an_alarm_counts_once_where_the_disk_refuses_its_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = Bridge(DirectoryTransport(tmp_path), rejects_alarms=True)
    for _ in range(PATIENCE - 1):
        bridge.donate(at=bridge.step, tensors={"w": torch.zeros(3)})
        bridge.take()
    bridge.donate(at=bridge.step, tensors={"w": torch.zeros(3)})

    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                bridge.look()
    assert bridge.look() is None
    assert bridge.inbox.sentinel.counts == {"zero": 1}
    assert bridge.transport.rejection("donor", PATIENCE - 1) == "alarm"


@pytest.mark.parametrize("rejects", [False, True])
def test_what_becomes_of_a_payload_that_raises_an_alarm(tmp_path: Path, rejects: bool) -> None:
    bridge = Bridge(DirectoryTransport(tmp_path), rejects_alarms=rejects)
    for _ in range(PATIENCE - 1):
        bridge.donate(at=bridge.step, tensors={"w": torch.zeros(3)})
        bridge.take()
    bridge.donate(at=bridge.step, tensors={"w": torch.zeros(3)})
    if not rejects:
        assert bridge.take().digest is not None
        return
    assert bridge.look() is None, "the donor is asked again"
    assert bridge.transport.rejection("donor", PATIENCE - 1) == "alarm"
    bridge.donate(at=bridge.step, tensors={"w": torch.ones(3)})
    bridge.take()
    assert bridge.fates() == {"applied": PATIENCE, "rejected": 1}


def test_that_a_receiver_counts_alarms_and_keeps_them_in_its_checkpoint(
    tmp_path: Path, fresh_state: None
) -> None:
    job = ReceiverAlone(tmp_path / "runs", exchange="gradient")
    tags = []
    for _ in range(PATIENCE + 1):
        job.backward()
        job.donate(job.constant(0.0))
        job.receiver.inject()
        job.optimizer.step()
        job.optimizer.zero_grad()
        assert job.receiver.commit()
        tags.append(job.receiver.metrics["events/alarms donor (alarms)"])
    assert tags == [0.0] * (PATIENCE - 1) + [1.0] * 2
    assert job.receiver.alarms() == {"donor": {"zero": 2}}
    assert job.receiver._state()["donors"]["donor"]["sentinel"]["counts"] == {"zero": 2}
    job.receiver.close()


@pytest.mark.parametrize("init_scale", [None, 1024.0])
@pytest.mark.parametrize("bound", [0.5, 2.0])
def test_that_a_donors_part_is_shrunk_to_its_bound(
    tmp_path: Path, fresh_state: None, bound: float, init_scale: float | None
) -> None:
    config: dict[str, Any] = {"exchange": "gradient", "donor_weight": 0.5}
    job = ReceiverAlone(tmp_path / "runs", init_scale=init_scale, **config)
    receiver, scale = job.receiver, init_scale or 1.0
    payload = {name: torch.randn_like(tensor) for name, tensor in job.constant(0.0).items()}
    norm = 0.5 * float(squared_norm(payload.values())) ** 0.5 / 4.0  # lambda S / n
    receiver.config.max_donor_norm = bound * norm
    job.backward(size=5)
    own = {n: p.grad.clone() for n, p in job.network.named_parameters() if p.grad is not None}
    job.donate(payload)
    receiver.inject()
    # What is back-propagated is the sum, where a scaler is at work over a power of two.
    own_factor, tolerance = (1 / 5, 1e-12) if init_scale is None else (4 / 5, 1e-5)
    for name, tensor in payload.items():
        expected = tensor * (0.5 / 4.0 * min(1.0, bound) * scale)
        if name in own:
            expected += own[name] * own_factor
        grad = job.network.get_parameter(name).grad
        torch.testing.assert_close(grad, expected, rtol=tolerance, atol=tolerance)
    measured = receiver.metrics["gradient/donor norm"]
    assert measured == pytest.approx(min(bound, 1.0) * norm, rel=1e-6)
    receiver._injected = None
    receiver.close()
