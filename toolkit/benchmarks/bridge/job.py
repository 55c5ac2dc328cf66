"""One job of a measured pair; ``accelerate launch job.py receiver|donor SETTINGS``.

Three kinds of rounds take turns in both jobs, so that a busy machine slows them alike: steps with
the bridge, hand-overs of as many raw bytes to and fro, and plain steps of the same model without
any bridge. The receiver says when it is the turn of the last two, by a file that the donor looks
for after every window, before it publishes weights that are answered after them only.
"""

from __future__ import annotations

import contextlib
import copy
import cProfile
import dataclasses
import itertools
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from toolkit import BridgeConfig, GradientDonor, GradientReceiver
from toolkit.benchmarks.bridge.raw import RawHandOver

NUM_LAYERS = 10  # of the backbone
NUM_CLASSES = 10
ASLEEP = 0.75  # of a step, where none is computed


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a measured job does.

    Attributes:
        runs_dir: where the run is, and what it has measured; on the disk that is measured.
        num_parameters: shared by both jobs, about.
        batch_size: samples of one rank in a step; how long a step is follows from it.
        computes: whether steps are computed. Otherwise they sleep, somewhat shorter than one would
            take, and leave the processors to the other job, which has to wait for the bridge alone:
            this one stands for a job on another machine.
        block: rounds of a kind before the next kind's turn; one more comes first, not counted.
        num_blocks: of each kind.
        profiles: whether the bridge's calls are profiled, which makes them a little slower.
        config: arguments of :class:`BridgeConfig`.
    """

    runs_dir: str
    num_parameters: int
    batch_size: int
    computes: bool = True
    block: int
    num_blocks: int
    profiles: bool = False
    config: dict[str, Any]


class Model(nn.Module):
    """A backbone of square linear layers, and two heads."""

    def __init__(self, num_parameters: int) -> None:
        super().__init__()
        width = self.width = max(NUM_CLASSES, round(math.sqrt(num_parameters / NUM_LAYERS)))
        layers = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(NUM_LAYERS)]
        self.backbone = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({name: nn.Linear(width, NUM_CLASSES) for name in ("h1", "h2")})

    def forward(self, inputs: Tensor, head: str) -> Tensor:
        """The logits (N, 10) of one head, for inputs (N, width)."""
        logits: Tensor = self.heads[head](self.backbone(inputs))
        return logits


class Noise(Dataset[tuple[Tensor, int]]):
    """Samples that are there at once: nothing is measured but steps."""

    def __init__(self, width: int, num_samples: int) -> None:
        self._inputs = torch.randn(64, width)
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._inputs[index % len(self._inputs)], index % NUM_CLASSES


class MeasuredJob:
    """What both sides have in common.

    Args:
        settings: what to do.

    Attributes:
        seconds: of each round, by kind; ``blocked`` is the bridge's part of a round with it.
        marks: by receiver step, when the donor began to publish its gradient, or the receiver had
            injected it; of a clock that all processes of a machine have in common.
    """

    role = ""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True)
        model = Model(settings.num_parameters)
        self.head, other = ("h1", "h2") if self.role == "receiver" else ("h2", "h1")
        model.heads[other].requires_grad_(False)
        # Plain steps have weights of their own: those of the bridge's model are published.
        self.plain_model = copy.deepcopy(model)
        self.plain_optimizer = torch.optim.SGD(self.plain_model.parameters(), lr=1e-3)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        num_batches = 10 * settings.num_blocks * (settings.block + 1)
        noise = Noise(model.width, num_batches * settings.batch_size)
        loader = DataLoader(noise, settings.batch_size)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.batch = next(iter(self.loader))
        shared = (*model.backbone.parameters(), *model.heads["h2"].parameters())
        self.num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in shared)
        self.raw_dir = Path(settings.runs_dir, "raw")
        self.raw_dir.mkdir(exist_ok=True)
        self.raw = RawHandOver(self.raw_dir, self.num_bytes)
        self.config = BridgeConfig(runs_dir=Path(settings.runs_dir), **settings.config)
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.marks: dict[int, float] = {}
        self.num_turns = 0  # of rounds without the bridge
        self._profile = cProfile.Profile()
        self._round = -1  # of this block
        self._round_began = self._blocked = 0.0
        self._asleep = 0.0  # seconds of a step that is not computed

    def loss(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of a batch."""
        if self.settings.computes:
            return cross_entropy(model(inputs, self.head), labels)
        if not self._asleep:
            start = time.perf_counter()
            cross_entropy(model(inputs, self.head), labels).backward()
            self._asleep = time.perf_counter() - start
            for parameter in model.parameters():
                parameter.grad = None
        time.sleep(ASLEEP * self._asleep)
        trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
        return sum((parameter.sum() for parameter in trained), torch.zeros(())) / 1e6

    def mark(self, receiver_step: int) -> None:
        """Note the time; not in the first round of a block, which began before others' turn."""
        if self._round >= 0:
            self.marks[receiver_step] = time.monotonic()

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        """Count what stands in it as the bridge's part of this round."""
        is_profiled = self.settings.profiles and self._round >= 0
        start = time.perf_counter()
        if is_profiled:
            self._profile.enable()
        yield
        if is_profiled:
            self._profile.disable()
        self._blocked += time.perf_counter() - start

    def end_round(self) -> None:
        """Count a round with the bridge, but for the first one of a block."""
        now = time.perf_counter()
        self._round += 1
        if self._round > 0:
            self.seconds["bridge"].append(now - self._round_began)
            self.seconds["blocked"].append(self._blocked)
        self._round_began, self._blocked = now, 0.0

    def turn_path(self) -> Path:
        """The file that says that rounds without the bridge are next."""
        return self.raw_dir / f"turn-{self.num_turns}"

    def take_turn(self) -> None:
        """Rounds without the bridge."""
        for index in range(-1, self.settings.block):
            start = time.perf_counter()
            if self.accelerator.is_main_process:
                self.hand_over(f"{self.num_turns}-{index}")
            if index >= 0:
                self.seconds["raw"].append(time.perf_counter() - start)
        self.accelerator.wait_for_everyone()
        for index in range(-1, self.settings.block):
            start = time.perf_counter()
            inputs, labels = self.batch
            self.loss(self.plain_model, inputs, labels).backward()
            self.plain_optimizer.step()
            self.plain_optimizer.zero_grad()
            if index >= 0:
                self.seconds["plain"].append(time.perf_counter() - start)
        self.num_turns += 1
        self._round = -1

    def hand_over(self, name: str) -> None:
        """A round of raw bytes: the receiver's to the donor, then the donor's to the receiver."""
        raise NotImplementedError

    def train(self) -> None:
        """All rounds."""
        raise NotImplementedError

    def profiled(self) -> dict[str, float]:
        """Seconds a round in each function itself, in the bridge's calls and this thread."""
        self._profile.create_stats()
        found: dict[str, float] = defaultdict(float)
        for (path, _, name), (_, _, own_seconds, *_) in self._profile.stats.items():
            place = name if path == "~" else f"{Path(path).stem}: {name}"
            found[place] += own_seconds / max(1, len(self.seconds["bridge"]))
        return found

    def write(self) -> None:
        """Leave the figures."""
        if self.accelerator.is_main_process:
            figures = {
                "seconds": self.seconds,
                "marks": self.marks,
                "num_bytes": self.num_bytes,
                "profile": self.profiled(),
            }
            path = Path(self.settings.runs_dir, f"{self.role}.json")
            path.write_text(json.dumps(figures))


class MeasuredReceiver(MeasuredJob):
    """Says when the rounds without the bridge have their turn, and when all is over."""

    role = "receiver"

    def hand_over(self, name: str) -> None:
        self.raw.write(f"weights-{name}")
        self.raw.read(f"gradient-{name}")

    def train(self) -> None:
        settings = self.settings
        total = settings.num_blocks * (settings.block + 1)
        receiver = GradientReceiver(self.accelerator, self.model, self.optimizer, self.config)
        with receiver, tqdm(total=total, disable=not self.accelerator.is_main_process) as bar:
            for inputs, labels in itertools.islice(self.loader, total):
                loss = self.loss(self.model, inputs, labels)
                receiver.backward(loss, len(labels))
                with self.blocked():
                    receiver.inject()
                self.mark(receiver.completed_steps)
                self.optimizer.step()
                self.optimizer.zero_grad()
                is_last = self._round + 1 == settings.block
                if is_last and self.accelerator.is_main_process:
                    self.turn_path().touch()
                with self.blocked():
                    receiver.commit()
                self.end_round()
                if is_last:
                    self.take_turn()
                bar.update()


class MeasuredDonor(MeasuredJob):
    """Follows, until the receiver has ended."""

    role = "donor"

    def hand_over(self, name: str) -> None:
        self.raw.read(f"weights-{name}")
        self.raw.write(f"gradient-{name}")

    def train(self) -> None:
        donor = GradientDonor(self.accelerator, self.model, self.optimizer, self.config)
        with donor:
            batches = donor.follow(self.loader)
            while True:
                with self.blocked():
                    batch = next(batches, None)
                if batch is None:
                    return
                inputs, labels = batch
                loss = self.loss(self.model, inputs, labels)
                donor.backward(loss, len(labels))
                self.mark(donor.receiver_step - 1)
                with self.blocked():
                    is_following = donor.publish()
                if not is_following:
                    self.optimizer.step()
                self.optimizer.zero_grad()
                self.end_round()
                is_due = broadcast_object_list([self.turn_path().exists()])[0]
                if is_due:
                    self.take_turn()


def main() -> None:
    """Measure as one side."""
    role, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    job = MeasuredReceiver(settings) if role == "receiver" else MeasuredDonor(settings)
    job.train()
    job.write()
    job.accelerator.end_training()


if __name__ == "__main__":
    main()
