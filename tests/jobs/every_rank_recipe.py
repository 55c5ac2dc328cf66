"""A recipe of which every rank writes its final weights, where the recipe has the main process's.

``every_rank_recipe.py RECIPE DIRECTORY ...`` writes ``DIRECTORY/<recipe>-<rank>.safetensors``.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from toolkit import training

if __name__ == "__main__":
    _, recipe, directory = sys.argv[:3]
    del sys.argv[0], sys.argv[1]
    final_weights = training.final_weights

    def write_and_return(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
        """What the recipe asks for."""
        assert accelerator.num_processes == 2
        assert accelerator.mixed_precision == "bf16"
        weights = final_weights(accelerator, model)
        path = Path(directory, f"{Path(recipe).stem}-{accelerator.process_index}.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
        return weights

    training.final_weights = write_and_return
    runpy.run_path(recipe, run_name="__main__")
