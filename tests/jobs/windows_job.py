"""Write which rows of a dataset this rank's micro-steps process, by optimizer step."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    """Run three epochs over ``num_samples`` rows and write ``rank-N.json``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir", type=Path)
    for name in ("num_samples", "batch_size", "accumulation", "seed"):
        parser.add_argument(name, type=int)
    args = parser.parse_args()
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=args.accumulation,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    assert accelerator.num_processes == 2
    torch.manual_seed(accelerator.process_index)  # the order must come from data_seed alone
    dataset = TensorDataset(torch.arange(args.num_samples))
    model, dataloader = accelerator.prepare(
        nn.Linear(1, 1), DataLoader(dataset, batch_size=args.batch_size, shuffle=True)
    )
    windows: list[list[int]] = [[]]
    for _ in range(3):
        for (indices,) in dataloader:
            with accelerator.accumulate(model):
                windows[-1] += indices.tolist()
                if accelerator.sync_gradients:
                    windows.append([])
    path = args.output_dir / f"rank-{accelerator.process_index}.json"
    path.write_text(json.dumps(windows))
    model, dataloader = accelerator.free_memory(model, dataloader)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
