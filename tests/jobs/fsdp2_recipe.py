"""A recipe under FSDP2 on the CPU, where Accelerate by itself makes DistributedDataParallel of it.

Launched with ``accelerate_configs/fsdp2.yaml``, whose settings reach the plugin by environment.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import accelerate
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

from tests.jobs.sharding import set_type


class ShardingAccelerator(Accelerator):
    """Prepares as it does on GPUs."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        assert self.num_processes == 2
        set_type(self, DistributedType.FSDP)
        self.state.fsdp_plugin = plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        if self.mixed_precision != "no":
            plugin.set_mixed_precision(self.mixed_precision)

    def prepare(self, *args: Any, **settings: Any) -> Any:
        prepared = super().prepare(*args, **settings)
        assert isinstance(prepared[0], FSDPModule), "Accelerate has not sharded the model"
        return prepared


if __name__ == "__main__":
    accelerate.Accelerator = ShardingAccelerator
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
