"""The recipe that this toolkit began with, word for word, as a baseline for the exchanges.

    accelerate launch toolkit/benchmarks/exchanges/seed_recipe.py donor --file h2.pt
    accelerate launch toolkit/benchmarks/exchanges/seed_recipe.py receiver --file h2.pt

The donor trains its own model and saves h2's parameters and newest gradient with ``torch.save``
after every backward. The receiver loads h2's parameters once, and in every step writes the newest
gradient that it finds into ``.grad``: the same one again until a newer file is there, as it is, not
rescaled. Nothing crosses for the backbone. The file is overwritten in place, so that a reader can
find half of one; it then keeps the gradient that it has, and counts that.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from toolkit.arguments import check_arguments, data_arguments, training_arguments
from toolkit.data import endless_batches, in_memory, to_dtype
from toolkit.metrics import start_tracking
from toolkit.optimizers import build_optimizer, parameter_groups
from toolkit.silos import load_data
from toolkit.training import clean_errors, evaluate, write_results

HEADS = {"donor": "h2", "receiver": "h1"}


class SharedFile:
    """h2 in a file that is overwritten without a rename.

    Args:
        path: of the file.

    Attributes:
        num_saved: how often this job has written it.
        num_bytes: how much, in all.
        num_torn: how often a new file could not be read as a whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_saved = self.num_bytes = self.num_torn = 0
        self._content: dict[str, dict[str, torch.Tensor]] | None = None
        self._time = 0

    def save(self, head: nn.Module) -> None:
        """Write h2's parameters and gradients."""
        parameters = dict(head.named_parameters())
        content = {
            "parameters": {name: p.detach() for name, p in parameters.items()},
            "gradients": {name: p.grad for name, p in parameters.items()},
        }
        torch.save(content, self.path)
        self.num_saved += 1
        self.num_bytes += self.path.stat().st_size

    def newest(self) -> dict[str, dict[str, torch.Tensor]]:
        """What the file holds, or held when it could last be read; waits for the first one."""
        while True:
            try:
                changed = self.path.stat().st_mtime_ns
                if changed != self._time:
                    self._content = torch.load(self.path)
                    self._time = changed
            except FileNotFoundError:
                pass
            except Exception:  # torch.load has no error of its own for half a file
                self.num_torn += 1
            if self._content is not None:
                return self._content
            time.sleep(0.01)


def main() -> None:
    """Train one of the two jobs."""
    parser = argparse.ArgumentParser(parents=[data_arguments(), training_arguments()])
    parser.add_argument("role", choices=HEADS)
    parser.add_argument("--file", type=Path, required=True, help="that both jobs share")
    args = parser.parse_args()
    check_arguments(parser, args)
    start_time, own_head = time.monotonic(), HEADS[args.role]
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        log_with="tensorboard",
        project_dir=args.output_dir,
    )
    set_seed(args.seed)
    task = load_data(args, own_head)
    dtype = getattr(torch, args.dtype)
    model: Any = task.build_model(task.classes_of(["h1", "h2"]), seed=args.seed).to(dtype)
    optimizer: Any = build_optimizer(args, parameter_groups(args, model))
    dataloader: Any = DataLoader(
        in_memory(task.train[own_head], own_head),
        batch_size=args.per_device_train_batch_size,
        shuffle=True,
    )
    model, optimizer, dataloader = accelerator.prepare(model, optimizer, dataloader)
    h2 = accelerator.unwrap_model(model).heads["h2"]
    shared = SharedFile(args.file)
    start_tracking(accelerator, args.output_dir, vars(args))
    if args.role == "receiver":
        h2.load_state_dict(shared.newest()["parameters"])

    batches = endless_batches(accelerator, dataloader, 0)
    for step in tqdm(range(1, args.max_train_steps + 1), desc=args.role):
        _, (inputs, labels) = next(batches)
        loss = F.cross_entropy(model(to_dtype(inputs, dtype), [own_head])[own_head], labels)
        accelerator.backward(loss)
        if args.role == "donor":
            shared.save(h2)
        else:
            gradients = shared.newest()["gradients"]
            for name, parameter in h2.named_parameters():
                parameter.grad = gradients[name]
        optimizer.step()
        optimizer.zero_grad()
        accelerator.log({"loss/own (per sample)": loss.item()}, step=step)

    heads = ["h2"] if args.role == "donor" else ["h1", "h2"]
    size = args.per_device_eval_batch_size
    results = {
        "recipe": "seed",
        "accuracies (%)": evaluate(accelerator, model, task.evaluation, heads, size),
        "completed_steps": args.max_train_steps,
        "seconds": time.monotonic() - start_time,
        "published_records": shared.num_saved,
        "published_bytes": shared.num_bytes,
        "torn_reads": shared.num_torn,
    }
    write_results(args.output_dir, results, accelerator.get_state_dict(model))
    accelerator.end_training()


if __name__ == "__main__":
    with clean_errors(ValueError):
        main()
