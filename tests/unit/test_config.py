"""Settings that contradict each other or make no sense are refused when they are made."""

from __future__ import annotations

import math
from typing import Any

import pytest

from toolkit.bridge.config import BridgeConfig


def test_that_the_defaults_train_as_one_job_would() -> None:
    config = BridgeConfig()

    assert (config.scope, config.max_staleness, config.rescale) == ("all", 0, "match")
    assert config.aggregate == "sum"
    assert (config.donor_weight, config.loss_reduction, config.unit) == (1.0, "mean", "samples")
    assert (config.peer_wait, config.require_peer) == (60.0, False)


def test_that_settings_have_names() -> None:
    with pytest.raises(TypeError, match="positional"):
        BridgeConfig("runs")  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        BridgeConfig().max_stalenes = 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "settings",
    [
        {"scope": "head", "max_staleness": 8, "rescale": "pool", "donor_weight": 0},
        {"rescale": "append", "loss_reduction": "sum", "peer_wait": 0.1},
        {"aggregate": "protect", "max_staleness": 8, "rescale": "pool"},
        {"stale": "damp", "max_staleness": 1},
        {"on_alarm": "reject", "max_donor_norm": 0.5, "exchange": "head"},
        {"stale": "damp", "max_staleness": 1, "exchange": "auto"},
        {"stale": "compensate_adaptive", "max_staleness": 8, "compensation": 0.5},
        {"checkpoint_interval": 1, "checkpoints_kept": 1, "payload_budget_files": 1},
        {"compression": "topk", "topk_ratio": 1.0, "exchange": "head"},
        {"compression": "bf16", "exchange": "delta"},
        {"run": "mine", "keep_payloads": True},
        {"exchange": "distill", "distill_loss": "mse", "temperature": 4.0, "donor_weight": 0.5},
        {"replay": "runs/0001", "runs_dir": "elsewhere"},
        {"resume_from_checkpoint": "runs/0001/receiver/step_1"},
    ],
)
def test_that_sensible_settings_are_taken(settings: dict[str, Any]) -> None:
    config = BridgeConfig(**settings)

    assert {name: getattr(config, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scope": "body"}, r"scope 'body' is unknown; choose one of \['all', 'head'\]"),
        ({"rescale": "plain"}, "'plain' is unknown"),
        ({"loss_reduction": "none"}, "'none' is unknown"),
        ({"rescale": "pool", "loss_reduction": "sum"}, "'pool'"),
        ({"aggregate": "pcgard"}, "aggregate 'pcgard' is unknown; choose one of .*'protect'"),
        ({"aggregate": "torchjd:NashMTL"}, "'torchjd:NashMTL' is unknown"),
        ({"aggregate": "mgda", "scope": "head"}, "'mgda' weighs two .* scope 'head'.*use scope"),
        ({"exchange": "distil"}, r"'distil' is unknown; choose one of .*'distill'"),
        (
            {"exchange": "distill", "scope": "head"},
            "scope 'head' .* at 'all': .* moves the backbone",
        ),
        ({"exchange": "distill", "rescale": "append"}, "rescale 'append' has no meaning"),
        ({"exchange": "distill", "aggregate": "mgda"}, "aggregate 'mgda' has no meaning"),
        ({"exchange": "distill", "max_staleness": 2}, "max_staleness 2 .*no step waits"),
        ({"exchange": "distill", "keep_payloads": True}, "keep_payloads True .*no record"),
        ({"exchange": "distill", "replay": "runs/1"}, "replay 'runs/1' has no meaning"),
        ({"exchange": "distill", "distill_loss": "ce"}, r"'ce' is unknown; .*\['kl', 'mse'\]"),
        ({"exchange": "distill", "temperature": 0.0}, "temperature must be positive.* got 0.0"),
        ({"temperature": math.inf}, "temperature must be positive.* got inf"),
        ({"compression": "zip"}, r"compression 'zip' is unknown; .*\['none', 'bf16', 'topk'\]"),
        ({"compression": "bf16", "exchange": "distill"}, "compression 'bf16' has no meaning for e"),
        ({"topk_ratio": 0.1}, "topk_ratio 0.1 has no meaning for compression 'none', leave it at"),
        ({"topk_ratio": 0.1, "compression": "bf16"}, "topk_ratio 0.1 .* 0.01: it is of compr"),
        ({"topk_ratio": 0.0, "compression": "topk"}, "topk_ratio must be above 0 .*, got 0.0"),
        ({"topk_ratio": 1.1, "compression": "topk"}, "topk_ratio must be .*most 1, got 1.1"),
        ({"topk_ratio": math.nan, "compression": "topk"}, "topk_ratio must be .* got nan"),
        ({"max_staleness": -1}, "max_staleness must not be negative, got -1"),
        ({"stale": "drop"}, r"stale 'drop' is unknown; choose one of \['apply', 'damp', 'comp"),
        ({"stale": "damp"}, "'damp' is about .* 1 to max_staleness .* max_staleness is 0: set it"),
        ({"frozen": "cross", "exchange": "distill"}, "it is of exchange 'auto' and 'gradient' and"),
        (
            {"stale": "damp", "exchange": "delta", "max_staleness": 32},
            "stale 'damp' has no meaning for exchange 'delta', leave it at 'apply'",
        ),
        ({"publish_every": 2}, "publish_every 2 .* 'auto', .*: it is of exchange 'distill' and 'h"),
        ({"init_h2": "donor", "exchange": "gradient"}, "init_h2 'donor' .*: it is of .* 'head'"),
        ({"on_alarm": "reject", "exchange": "distill"}, "on_alarm 'reject' has no meaning"),
        ({"on_alarm": "drop"}, r"on_alarm 'drop' is unknown; choose one of \['warn', 'reject'\]"),
        ({"max_donor_norm": 0.0}, "max_donor_norm must be positive and finite, or None, got 0.0"),
        ({"max_donor_norm": 1.0, "exchange": "delta"}, "max_donor_norm 1.0 has no meaning"),
        ({"local_steps": 8}, "local_steps 8 has no meaning .* at 32: it is of exchange 'delta'"),
        ({"outer_learning_rate": 0.7, "exchange": "distill"}, "outer_learning_rate 0.7 has no"),
        ({"outer_momentum": 0.9, "exchange": "head"}, "outer_momentum 0.9 has no meaning"),
        ({"distill_loss": "mse", "exchange": "gradient"}, "distill_loss 'mse' has no meaning"),
        ({"temperature": 1.0, "exchange": "delta"}, "temperature 1.0 .*'auto' and 'distill'"),
        (
            {"stale": "damp", "max_staleness": 1, "compensation": 0.1},
            "compensation 0.1 is lambda of .* and stale is 'damp'",
        ),
        (
            {"stale": "compensate", "max_staleness": 1, "compensation": 0},
            "compensation must be finite and positive, got 0",
        ),
        (
            {"stale": "compensate", "max_staleness": 1, "compensation": math.nan},
            "compensation must be finite and positive, got nan",
        ),
        ({"donor_weight": -0.1}, "donor_weight must be finite, not negative: got -0.1"),
        ({"donor_weight": math.nan}, "donor_weight.*nan"),
        ({"peer_wait": 0}, "peer_wait must be positive, got 0"),
        ({"peer_wait": math.nan}, "peer_wait.*nan"),
        ({"run": "a", "resume_from_checkpoint": "b"}, "'a' and resume_from_checkpoint 'b' exclude"),
        ({"replay": "runs/0001"}, "runs_dir 'runs' holds the run to replay.*of its own"),
        ({"replay": "a/b", "keep_payloads": True}, "replay 'a/b' and keep_payloads exclude"),
        ({"replay": "a/b", "require_peer": True}, "replay 'a/b' and require_peer exclude"),
        ({"replay": "a/b", "resume_from_checkpoint": "c"}, "replay 'a/b' and resume_from_ch"),
    ],
    ids=str,
)
def test_that_senseless_settings_are_refused_by_name(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BridgeConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"donor_weight": math.inf},
        {"payload_budget_files": 0},
        {"payload_budget_gib": 0.0},
        {"payload_budget_gib": math.nan},
        {"checkpoint_interval": 0},
        {"checkpoint_interval": -5},
        {"checkpoints_kept": 0},
        {"checkpoints_kept": -1},
    ],
    ids=str,
)
def test_that_values_out_of_range_are_refused_by_name(settings: dict[str, Any]) -> None:
    # these are taken. An infinite weight makes the model NaN at its first step; a budget that
    # nothing fits into ends the donor at its first payload; the other numbers switch off the
    # check of the budget.
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        BridgeConfig(**settings)


def test_where_gradients_of_older_weights_may_come() -> None:
    for exchange in ("auto", "gradient", "delta", "head"):
        config = BridgeConfig(exchange=exchange, max_staleness=32)
        assert config.has_stale_gradients is (exchange in ("auto", "gradient"))
    assert not BridgeConfig().has_stale_gradients


@pytest.mark.parametrize("name", ["", "receiver", "bridge", "heads", "a.b", "../x", "1st", "a b"])
def test_that_a_donor_is_not_named_otherwise_than_a_job(name: str) -> None:
    with pytest.raises(ValueError, match="donor_name"):
        BridgeConfig(donor_name=name)
    assert BridgeConfig(donor_name="second-donor_2").donor_name == "second-donor_2"


def test_that_every_head_has_a_weight() -> None:
    assert BridgeConfig(donor_weight=0.3).weights_of(["heads.h2"]) == {"heads.h2": 0.3}
    config = BridgeConfig(donor_weight={"heads.h2": 0.5, "heads.h3": 0.0})
    assert config.weights_of(["heads.h3", "heads.h2"]) == {"heads.h3": 0.0, "heads.h2": 0.5}
    with pytest.raises(ValueError, match=r"has no \['heads.h4'\], only \['heads.h2', 'heads.h3'\]"):
        config.weights_of(["heads.h2", "heads.h3", "heads.h4"])
    with pytest.raises(ValueError, match=r"names \['heads.h3'\], but donors train \['heads.h2'\]"):
        config.weights_of(["heads.h2"])
    with pytest.raises(ValueError, match="not negative: got -1"):
        BridgeConfig(donor_weight={"heads.h2": -1.0})
