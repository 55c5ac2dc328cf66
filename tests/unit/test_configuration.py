"""What a job may be configured as; in this process, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType, ParallelismConfig

from tests.jobs.sharding import set_type
from tests.unit.jobs import reset
from toolkit.configuration import check_configuration


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Nothing of one test's Accelerator is left for the next."""
    reset()
    yield
    reset()


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ],
)
def test_that_a_setting_that_accelerate_drops_is_refused(
    variable: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = Accelerator(cpu=True)
    check_configuration(accelerator)
    monkeypatch.setenv(variable, "true")
    message = (
        f"{name} is configured .{variable}=true.* on device cpu .* train as NO .* several GPUs"
    )
    with pytest.raises(ValueError, match=message):
        check_configuration(accelerator, may_shard=True)


def test_that_a_plugin_on_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # restored: the plugin sets it
    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    with pytest.raises(ValueError, match="FSDP is configured"):
        check_configuration(accelerator, may_shard=True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (DistributedType.DEEPSPEED, "DeepSpeed: its engine .* every ZeRO stage. Configure one"),
        (DistributedType.MEGATRON_LM, "Megatron-LM: its engine"),
        (DistributedType.XLA, "TPU: it reduces gradients inside"),
        (DistributedType.MULTI_XPU, "MULTI_XPU, which nobody has tried"),
    ],
)
def test_that_other_kinds_are_refused(kind: DistributedType, message: str) -> None:
    accelerator = Accelerator(cpu=True)
    set_type(accelerator, kind)
    with pytest.raises(ValueError, match=f"not supported: .*{message}"):
        check_configuration(accelerator, may_shard=True)


def test_which_fsdp_is_taken() -> None:
    accelerator = Accelerator(cpu=True)
    set_type(accelerator, DistributedType.FSDP)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    check_configuration(accelerator, may_shard=True)
    with pytest.raises(ValueError, match=r"FSDP is not supported here: .* whole parameters"):
        check_configuration(accelerator)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    with pytest.raises(ValueError, match=r"fsdp_version 1 .* Set fsdp_version: 2"):
        check_configuration(accelerator, may_shard=True)


def test_that_ranks_which_share_a_batch_are_refused() -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.state.parallelism_config = ParallelismConfig(cp_size=2, dp_shard_size=2)
    with pytest.raises(ValueError, match="parallelism cp is not supported: its ranks share"):
        check_configuration(accelerator, may_shard=True)


def test_that_fp16_without_a_scaler_is_refused() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    with pytest.raises(ValueError, match=r"fp16 needs a GPU: on device cpu .* in fp32"):
        check_configuration(accelerator)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    check_configuration(accelerator)


def test_that_float64_in_mixed_precision_is_refused_where_a_recipe_says_so() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    check_configuration(accelerator, dtype="float32")
    check_configuration(accelerator)  # a bridge's model may have parts in either
    with pytest.raises(ValueError, match=r"float64 with mixed precision bf16: .*--dtype float32"):
        check_configuration(accelerator, dtype="float64")
