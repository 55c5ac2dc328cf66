"""What a job was configured to run as, against what it runs as.

Accelerate drops some settings without a word: on the CPU an FSDP configuration becomes
DistributedDataParallel, and fp16 becomes fp32; autocast leaves float64 as it is. Nothing here is
run as something else.
"""

from __future__ import annotations

import os

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType

_REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_USE = "one process, or distributed_type MULTI_GPU (DistributedDataParallel)"
_ZERO = "its engine keeps gradients and optimizer steps to itself, in buffers of its own"
_REASONS = {
    DistributedType.DEEPSPEED: f"DeepSpeed: {_ZERO}, in every ZeRO stage",
    DistributedType.MEGATRON_LM: f"Megatron-LM: {_ZERO}",
    DistributedType.XLA: "TPU: it reduces gradients inside the optimizer's step",
}
# What the launcher (or a plugin given to the Accelerator) sets, and what must come of it.
_REQUESTS = {
    "ACCELERATE_USE_FSDP": ("FSDP", DistributedType.FSDP),
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", DistributedType.DEEPSPEED),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", DistributedType.MEGATRON_LM),
}
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def check_configuration(
    accelerator: Accelerator, *, may_shard: bool = False, dtype: str = "float32"
) -> None:
    """Refuse what this toolkit cannot do, and what Accelerate would run as something else.

    Args:
        accelerator: the job's accelerator.
        may_shard: whether the caller can work on parameters that FSDP2 has sharded.
        dtype: what the caller has chosen for its weights.

    Raises:
        ValueError: naming the setting, the reason and the remedy.
    """
    _check_launch()
    _check_num_processes(accelerator)
    kind = accelerator.distributed_type
    for variable, (name, requested) in _REQUESTS.items():
        if os.environ.get(variable, "").lower() in ("1", "true") and kind != requested:
            raise ValueError(
                f"{name} is configured ({variable}=true), but with {accelerator.num_processes} "
                f"process(es) on device {accelerator.device.type} Accelerate would train as "
                f"{kind.value} without a word. Launch on several GPUs, or configure {_USE}"
            )
    if kind == DistributedType.FSDP:
        _check_fsdp(accelerator, may_shard)
    elif kind not in _REPLICATED:
        reason = _REASONS.get(kind, f"distributed type {kind.value}, which nobody has tried")
        raise ValueError(f"not supported: {reason}. Configure {_USE}")
    parallelism = accelerator.parallelism_config
    if parallelism is not None and parallelism.non_dp_dim_names:
        raise ValueError(
            f"parallelism {', '.join(parallelism.non_dp_dim_names)} is not supported: its ranks "
            "share a batch, and a sum over all ranks would count it several times. Leave "
            "data parallelism only (dp_shard_size)"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ValueError(
            f"mixed precision fp16 needs a GPU: on device {accelerator.device.type} Accelerate "
            "would train in fp32 without a word. Use bf16, or no mixed precision"
        )
    if dtype == "float64" and accelerator.mixed_precision != "no":
        raise ValueError(
            f"--dtype float64 with mixed precision {accelerator.mixed_precision}: autocast leaves "
            "float64 as it is, and all would run in float64 without a word. Give --mixed_precision "
            "no (to the recipe, whatever `accelerate launch` or its configuration says), or "
            "--dtype float32"
        )


def check_one_scaled_optimizer(accelerator: Accelerator) -> None:
    """Refuse several optimizers that share a loss scaler.

    Whether a fused optimizer's step was skipped shows in the scale alone, and every optimizer that
    Accelerate has prepared moves it.

    Raises:
        ValueError: if there is a loss scaler and more than one prepared optimizer.
    """
    if accelerator.scaler is not None and len(accelerator._optimizers) > 1:
        raise ValueError(
            f"{len(accelerator._optimizers)} optimizers share one loss scaler, so that an overflow "
            "in one looks like a skipped step of another: give all parameters to one optimizer, in "
            "groups, or use bf16"
        )


def _check_launch() -> None:
    """Notice that ``accelerate launch`` was asked for several processes, and started one.

    On the way where it does so it prepares a meeting place, and numbers no ranks.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if launched and not any(name in os.environ for name in _WORLD_SIZES):
        raise ValueError(
            "several processes are configured (MASTER_PORT is set), but accelerate launch has "
            "started one without a word, as it does with --cpu or distributed_type MULTI_CPU. "
            "Configure distributed_type: MULTI_GPU, with use_cpu: true on the CPU "
            "(accelerate_configs/cpu_2proc.yaml); for one process say num_processes: 1, and unset "
            "MASTER_PORT if your shell sets it"
        )


def _check_num_processes(accelerator: Accelerator) -> None:
    """Notice ranks that each believe to be alone, as ``Accelerator()`` does on CPUs."""
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world_size > 1 and accelerator.num_processes == 1:
        raise ValueError(
            f"torch.distributed has {world_size} processes, and Accelerate takes each for the only "
            "one, as it does without GPUs: make it by Accelerator(cpu=True)"
        )


def _check_fsdp(accelerator: Accelerator, may_shard: bool) -> None:
    version = accelerator.state.fsdp_plugin.fsdp_version
    if not may_shard:
        raise ValueError(f"FSDP is not supported here: this works on whole parameters. Use {_USE}")
    if version != 2:
        raise ValueError(
            f"fsdp_version {version} is not supported: it flattens parameters into buffers that "
            "have neither their names nor their shapes. Set fsdp_version: 2"
        )
