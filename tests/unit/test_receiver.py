"""The receiver's three calls in one process: what they refuse, and what a skipped step leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.oracle import Case, build_network
from tests.unit.jobs import ReceiverAlone, StartReceiver, batches, look_once, weights_of
from toolkit import BridgeConfig, GradientReceiver, PeerError


@pytest.fixture
def job(start_receiver: StartReceiver) -> ReceiverAlone:
    return start_receiver()


def test_that_a_lone_receiver_takes_exact_steps(start_receiver: StartReceiver) -> None:
    job = start_receiver(accumulation=3)
    sizes = [2, 5, 1]
    for inputs, labels in batches("h1", sizes):
        with job.accelerator.accumulate(job.model):
            loss = F.cross_entropy(job.network(inputs, "h1"), labels)
            job.receiver.backward(loss, num_samples=len(labels))
            job.receiver.inject()
            job.optimizer.step()
            job.optimizer.zero_grad()
            job.receiver.commit()
    twin = build_network(Case())
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01)
    inputs, labels = next(batches("h1", [sum(sizes)]))
    F.cross_entropy(twin(inputs, "h1"), labels).backward()
    optimizer.step()
    for name, parameter in job.network.named_parameters():
        expected = twin.get_parameter(name)
        assert torch.allclose(parameter, expected, rtol=0, atol=1e-14), name
    assert torch.equal(
        job.network.get_parameter("heads.h2.weight"), twin.get_parameter("heads.h2.weight")
    )


def test_that_the_donors_head_rests_without_a_payload(job: ReceiverAlone) -> None:
    job.backward()
    assert job.published == 0
    job.donate(job.constant(1.0))
    job.receiver.inject()
    job.optimizer.step()
    job.optimizer.zero_grad()
    job.receiver.commit()
    moved = job.network.get_parameter("heads.h2.weight").detach().clone()
    assert not torch.equal(moved, build_network(Case()).get_parameter("heads.h2.weight"))

    for set_to_none in (True, False):  # AdamW's moments must not move it on
        job.backward()
        job.receiver.inject()
        job.optimizer.step()
        job.optimizer.zero_grad(set_to_none=set_to_none)
        job.receiver.commit()
        assert torch.equal(job.network.get_parameter("heads.h2.weight"), moved)


def test_that_a_weight_of_a_head_that_no_donor_trains_is_refused(tmp_path: Path) -> None:
    weights = {"heads.h2": 0.5, "h2": 0.7}
    with pytest.raises(ValueError, match=r"donor_weight names \['h2'\], but donors train \['heads"):
        ReceiverAlone(tmp_path / "runs", donor_weight=weights)


def test_that_calls_in_the_wrong_order_are_refused(job: ReceiverAlone, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no backward"):
        job.receiver.inject()
    with pytest.raises(RuntimeError, match=r"commit\(\) without inject"):
        job.receiver.commit()
    job.backward()
    with pytest.raises(RuntimeError, match=r"second backward\(\)"):
        job.backward()
    with pytest.raises(RuntimeError, match="middle of an accumulation window"):
        job.accelerator.save_state(str(tmp_path / "early"))
    job.receiver.inject()
    with pytest.raises(RuntimeError, match="called twice"):
        job.receiver.inject()
    with pytest.raises(RuntimeError, match=r"call commit\(\) after"):
        job.backward()
    with pytest.raises(RuntimeError, match=r"between inject\(\) and commit"):
        job.accelerator.save_state(str(tmp_path / "late"))
    job.optimizer.step()
    assert job.receiver.commit()
    job.accelerator.save_state(str(tmp_path / "good"))
    assert (tmp_path / "good" / "gradient_bridge.json").is_file()


def test_that_a_missing_donor_is_an_error_if_required(start_receiver: StartReceiver) -> None:
    job = start_receiver(require_peer=True)
    with pytest.raises(PeerError, match=r"did not come for 0\.2 s"):
        job.step()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"head": "heads.h3"}, "no module 'heads.h3'; it has .*heads.h2"),
        ({"backbone": "trunk"}, "no module 'trunk'; it has backbone"),
    ],
)
def test_that_an_unknown_module_is_named(
    job: ReceiverAlone, tmp_path: Path, names: dict[str, Any], message: str
) -> None:
    config = BridgeConfig(runs_dir=tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        GradientReceiver(job.accelerator, job.model, job.optimizer, config, **names)


def test_that_a_filter_on_requires_grad_is_noticed(job: ReceiverAlone, tmp_path: Path) -> None:
    trainable = [p for p in job.network.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=r"in no optimizer group: heads\.h2\.weight"):
        GradientReceiver(
            job.accelerator,
            job.model,
            torch.optim.SGD(trainable, lr=0.1),
            BridgeConfig(runs_dir=tmp_path / "other"),
        )


def test_that_a_frozen_layer_of_the_backbone_rests(start_receiver: StartReceiver) -> None:
    # Frozen in both jobs, as under adapters, the donor sends zeros for it: with them as its
    # gradient the weight decay would move it.
    name = "backbone.0.weight"
    job = start_receiver()
    frozen = job.network.get_parameter(name).requires_grad_(False)
    before = frozen.detach().clone()
    for value in (0.0, 1.0):
        with job.accelerator.accumulate(job.model):
            job.backward()
            job.donate(job.constant(value))
            job.receiver.inject()
            assert frozen.grad is None
            assert job.network.get_parameter("backbone.0.bias").grad is not None
            norm = job.receiver.metrics["gradient/donor norm"]
            job.optimizer.step()
            job.optimizer.zero_grad()
            assert job.receiver.commit()
    assert torch.equal(frozen, before)
    others = sum(p.numel() for n, p in job.receiver.shared.parameters.items() if n != name)
    assert norm == pytest.approx(others**0.5 / 4), "what is not added is no part of the step"


def test_that_an_optimizer_may_leave_a_frozen_layer_out(job: ReceiverAlone, tmp_path: Path) -> None:
    job.network.get_parameter("backbone.0.weight").requires_grad_(False)
    heads = list(job.network.heads["h2"].parameters())
    trained = [*(p for p in job.network.parameters() if p.requires_grad), *heads]
    receiver = GradientReceiver(
        job.accelerator,
        job.model,
        torch.optim.SGD(trained, lr=0.1),
        BridgeConfig(runs_dir=tmp_path / "other"),
    )
    receiver.close()


def test_that_fused_sgd_with_momentum_is_refused(job: ReceiverAlone, tmp_path: Path) -> None:
    parameters, config = list(job.network.parameters()), BridgeConfig(runs_dir=tmp_path / "other")
    with pytest.raises(ValueError, match=r"SGD\(fused=True\) with momentum fails in torch"):
        GradientReceiver(
            job.accelerator,
            job.model,
            job.accelerator.prepare(torch.optim.SGD(parameters, 0.1, momentum=0.9, fused=True)),
            config,
        )
    optimizer = torch.optim.SGD(parameters, 0.1, fused=True)
    GradientReceiver(job.accelerator, job.model, optimizer, config).close()


def test_that_an_overflow_of_another_optimizer_cannot_pass_for_one_of_this(
    start_receiver: StartReceiver, tmp_path: Path
) -> None:
    """The payload would have been applied, and would be applied again."""
    job = start_receiver(init_scale=2.0**10)
    job.accelerator.prepare(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1))
    with pytest.raises(ValueError, match="2 optimizers share one loss scaler"):
        GradientReceiver(
            job.accelerator, job.model, job.optimizer, BridgeConfig(runs_dir=tmp_path / "second")
        )
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("fused", [False, True])
def test_that_a_payload_outlives_an_overflow(start_receiver: StartReceiver, fused: bool) -> None:
    job = start_receiver(init_scale=2.0**10, fused=fused)
    with job.accelerator.accumulate(job.model):
        job.backward(factor=1e38)  # finite, but not times the scale
        job.donate(job.constant(1.0))
        job.receiver.inject()
        before = weights_of(job.network)
        job.optimizer.step()
        job.optimizer.zero_grad()
        assert not job.receiver.commit()
    for name, parameter in job.network.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert (job.receiver.completed_steps, job.receiver.completed_windows) == (0, 1)
    assert job.receiver.fates()["applied"] == 0
    assert job.receiver.fates()["pending"] == 1

    with job.accelerator.accumulate(job.model):
        job.backward()
        job.receiver.inject()
        head = job.network.get_parameter("heads.h2.weight")
        assert head.grad is not None
        # match: lambda S / n_d times the scale, the payload itself untouched by the first try
        assert torch.equal(head.grad, torch.full_like(head, 1.0 / 4.0 * 2.0**9))
        job.optimizer.step()
        job.optimizer.zero_grad()
        assert job.receiver.commit()
    assert job.receiver.fates()["applied"] == 1
    assert job.receiver.fates()["pending"] == 0
    assert not torch.equal(
        job.network.get_parameter("heads.h2.weight"), before["heads.h2.weight"]
    ), "the payload that outlived the overflow was not applied"


def test_that_a_scaler_changes_nothing(start_receiver: StartReceiver) -> None:
    weights = []
    for init_scale in (1.0, 2.0**12):
        job = start_receiver(init_scale=init_scale)
        for value in (0.3, -0.7, 0.1):
            with job.accelerator.accumulate(job.model):
                job.backward()
                job.donate(job.constant(value))
                job.receiver.inject()
                job.accelerator.clip_grad_norm_(job.model.parameters(), 0.5)
                job.optimizer.step()
                job.optimizer.zero_grad()
                job.receiver.commit()
        assert job.receiver.fates()["applied"] == 3
        weights.append(weights_of(job.network))
        job.receiver.close()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_that_a_required_donor_may_not_end(start_receiver: StartReceiver) -> None:
    job = start_receiver(require_peer=True)
    with job.accelerator.accumulate(job.model):
        job.backward()
        job.donate(None, kind="end")
        with pytest.raises(PeerError, match="the donor has ended"):
            job.receiver.inject()


def test_that_a_zero_grad_in_the_middle_of_a_window_is_noticed(
    start_receiver: StartReceiver,
) -> None:
    job = start_receiver(accumulation=2)
    with job.accelerator.accumulate(job.model):
        job.backward()
    with job.accelerator.accumulate(job.model):
        job.optimizer.zero_grad()
        with pytest.raises(RuntimeError, match=r"call zero_grad\(\) after"):
            job.backward()


def test_that_a_donor_back_from_a_silence_finds_the_present_weights(
    start_receiver: StartReceiver,
) -> None:
    job = start_receiver()
    job.step()  # alone, after the wait
    job.step()
    assert job.weights_record().header.receiver_step == 0, "published for nobody"
    with job.accelerator.accumulate(job.model):
        job.backward()
        job.donate(job.constant(1.0))  # late: of the weights that it could find
        job.receiver._collector.on_main.begin()
        with pytest.raises(Stop):
            job.receiver.control.decide(stop_after(job, 2))
    assert job.weights_record().header.receiver_step == 2


class Stop(Exception):
    pass


def stop_after(job: ReceiverAlone, looks: int) -> Callable[[], None]:
    """The receiver's own poll, a few times."""
    counter = iter(range(looks))

    def poll() -> None:
        if next(counter, None) is None:
            raise Stop
        assert look_once(job.receiver) is None

    return poll


def test_that_the_donors_validation_is_among_the_metrics(job: ReceiverAlone) -> None:
    with job.accelerator.accumulate(job.model):
        job.backward()
        job.donate(job.constant(1.0), validation={"h2 (%)": 87.5})
        job.receiver.inject()
        assert job.receiver.metrics["validation/donor h2 (%)"] == 87.5
        job.optimizer.step()
        job.receiver.commit()


def test_that_steps_after_the_last_exchange_of_differences_count_as_alone(
    start_receiver: StartReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    job = start_receiver(exchange="delta", local_steps=2)
    job.step()
    job.donate(job.constant(0.1), kind="delta")
    for _ in range(2):
        job.step()
    job.receiver.close()
    job.receiver.close()
    assert job.receiver.fates()["applied"] == 1
    assert (job.receiver.completed_steps, job.receiver.steps_alone) == (3, 1)
    assert "steps taken alone, after the last exchange: 1" in caplog.text
