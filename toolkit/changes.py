"""Which layers the optimizer steps of each task change, bit by bit."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

from toolkit.parameters import same_bits


@dataclasses.dataclass(kw_only=True, slots=True)
class LayerChange:
    """What all steps of one task did to one layer.

    Attributes:
        steps: optimizer steps of the task.
        weight_steps: of these, in how many a weight changed.
        state_steps: of these, in how many the layer's optimizer state changed.
        has_state: whether the optimizer has kept any state of the layer so far.
        largest_change: of one weight in one step; absolute.
    """

    steps: int = 0
    weight_steps: int = 0
    state_steps: int = 0
    has_state: bool = False
    largest_change: float = 0.0


class ChangeRecord:
    """Compares layers and their optimizer state before and after every step. Copies the model.

    Register it with ``accelerator.register_for_checkpointing`` to count on after a resume.

    Args:
        layers: by name.
        optimizer: that steps them, prepared or not.

    Attributes:
        last: by layer, the largest absolute change of a weight in the latest step.
        by_task: by task and layer, what its steps did.
    """

    def __init__(self, layers: Mapping[str, nn.Module], optimizer: Optimizer) -> None:
        self.last: dict[str, float] = {}
        self.by_task: dict[str, dict[str, LayerChange]] = {}
        self._layers = dict(layers)
        self._optimizer = optimizer

    @contextlib.contextmanager
    def step_of(self, task: str, *, enabled: bool = True) -> Iterator[None]:
        """Record what the block does, as one step of ``task``; with ``enabled=False``, nothing."""
        if not enabled:
            yield
            return
        before = self._snapshot()
        yield
        after = self._snapshot()
        changes = self.by_task.setdefault(task, {name: LayerChange() for name in self._layers})
        for name, change in changes.items():
            (weights, state), (new_weights, new_state) = before[name], after[name]
            pairs = list(zip(weights, new_weights, strict=True))
            self.last[name] = max(
                (float((new - old).abs().max()) for old, new in pairs if old.numel()), default=0.0
            )
            change.steps += 1
            change.weight_steps += not all(same_bits(*pair) for pair in pairs)
            change.state_steps += state.keys() != new_state.keys() or not all(
                same_bits(state[key], new_state[key]) for key in state
            )
            change.has_state |= bool(new_state)
            change.largest_change = max(change.largest_change, self.last[name])

    def _snapshot(self) -> dict[str, tuple[list[Tensor], dict[tuple[int, str], Any]]]:
        """By layer, copies of its weights and of their optimizer state."""
        found = {}
        for layer, module in self._layers.items():
            weights = list(module.parameters())
            state = {
                (number, key): value.detach().clone() if isinstance(value, Tensor) else value
                for number, weight in enumerate(weights)
                # .get, because reading a defaultdict would add to the optimizer's state
                for key, value in self._optimizer.state.get(weight, {}).items()
            }
            found[layer] = [weight.detach().clone() for weight in weights], state
        return found

    def state_dict(self) -> dict[str, Any]:
        """The counts, fit for JSON: by task and layer, the fields of ``LayerChange``."""
        return {
            task: {name: dataclasses.asdict(change) for name, change in changes.items()}
            for task, changes in self.by_task.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on from a checkpoint."""
        self.by_task = {
            task: {name: LayerChange(**change) for name, change in changes.items()}
            for task, changes in state.items()
        }

    def table(self) -> Table:
        """The record for a terminal; tasks in order of their names, counts in optimizer steps."""
        title = "What the steps of each task changed"
        table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("steps", "layer", "weights", "optimizer state"):
            table.add_column(heading, no_wrap=True)
        table.add_column("max change", justify="right", no_wrap=True)
        for task in sorted(self.by_task):
            for number, (name, change) in enumerate(self.by_task[task].items()):
                state = _verdict(change.state_steps) if change.has_state else "none"
                table.add_row(
                    "" if number else f"{change.steps} of {task}",
                    name,
                    _verdict(change.weight_steps),
                    state,
                    f"{change.largest_change:.2g}",
                )
            table.add_section()
        return table


def _verdict(num_steps: int) -> str:
    return f"changed in {num_steps}" if num_steps else "unchanged"
