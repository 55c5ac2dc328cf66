"""What a job may be configured as; in this process, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, ParallelismConfig
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from tests.jobs.sharding import set_type
from toolkit.configuration import check_configuration, check_one_scaled_optimizer

pytestmark = pytest.mark.usefixtures("fresh_state")


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


def launched_alone(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """Set what the launcher gives to the one process that it starts by itself."""
    parsed = launch_command_parser().parse_args([*options, "script.py"])
    args = _validate_launch_command(parsed)[0]
    assert not args.multi_gpu or args.cpu, "this would start several processes"
    for name, value in prepare_simple_launcher_cmd_env(args)[1].items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("way", ["flags", "MULTI_CPU", "CPU beside a GPU configuration"])
def test_that_one_process_where_several_were_asked_for_is_refused(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.yaml"
    kind = "MULTI_CPU" if way == "MULTI_CPU" else "MULTI_GPU"
    config.write_text(f"distributed_type: {kind}\nnum_processes: 2\nuse_cpu: true\n")
    several = {
        "flags": ["--cpu", "--num_processes=2"],
        "MULTI_CPU": [f"--config_file={config}"],
        "CPU beside a GPU configuration": ["--cpu", f"--config_file={config}"],
    }
    launched_alone(monkeypatch, "--cpu", "--num_processes=1")
    check_configuration(Accelerator(cpu=True))
    launched_alone(monkeypatch, *several[way])
    with pytest.raises(ValueError, match=r"several processes .* has started one .*cpu_2proc.yaml"):
        check_configuration(Accelerator(cpu=True))
    monkeypatch.setenv("PMI_SIZE", "2")  # mpirun starts the others
    check_configuration(Accelerator(cpu=True))


def test_that_optimizers_that_share_a_loss_scaler_are_refused() -> None:
    accelerator = Accelerator(cpu=True)
    for _ in range(2):
        accelerator.prepare(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1))
    check_one_scaled_optimizer(accelerator)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="2 optimizers share one loss scaler"):
        check_one_scaled_optimizer(accelerator)


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
