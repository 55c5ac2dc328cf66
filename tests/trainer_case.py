"""What two jobs with ``transformers.Trainer`` train, and the same in one process, by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2Model

VOCABULARY, NUM_CLASSES = 11, 5
NUM_SAMPLES = {"h1": 28, "h2": 20}
BATCH_SIZE = {"h1": 2, "h2": 3}  # of a rank and micro-batch; the donor's last one has 2
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-2, 0.1, 0.05
DONOR_WEIGHT = 0.7
IGNORED = -100  # as a label


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerCase:
    """One setting of both jobs."""

    tokens: bool  # a loss of each token, divided by num_items_in_batch; else of each sequence
    accumulation: int = 3  # the receiver's: 7 micro-batches of 2 ranks in an epoch
    donor_accumulation: int = 4  # likewise
    donor_trainer: bool = True  # or a plain loop
    num_epochs: int = 2
    save_steps: int = 0  # receiver: 0 for no checkpoints
    fail_at: int = 0  # receiver: an error after so many steps
    resume_from: int = 0  # receiver: the step of a checkpoint
    mutation: str = ""  # see tests/jobs/trainer_job.py

    def num_steps(self, num_processes: int) -> int:
        """The receiver's, on so many ranks."""
        samples = BATCH_SIZE["h1"] * num_processes * self.accumulation
        return self.num_epochs * math.ceil(NUM_SAMPLES["h1"] / samples)


class Sequences(nn.Module):
    """A small GPT-2 as backbone, and a head for each task.

    Args:
        heads: names of the heads it has.
        own: that of the head that its loss is of.
        tokens: whether the loss is the next tokens', or the whole sequence's class.
    """

    loss_type = "ForCausalLM"  # tells the Trainer that the first token is nobody's next one

    def __init__(self, heads: tuple[str, ...], own: str, tokens: bool) -> None:
        super().__init__()
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=16, n_embd=8, n_layer=2, n_head=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        self.backbone = GPT2Model(config)
        width = VOCABULARY if tokens else NUM_CLASSES
        self.heads = nn.ModuleDict({head: nn.Linear(8, width) for head in heads})
        self.own, self.accepts_loss_kwargs = own, tokens
        self.double()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The mean loss over the batch, or over ``num_items_in_batch`` tokens."""
        total, count = self.summed_loss(input_ids, attention_mask, labels, self.own)
        return {"loss": total / (count if num_items_in_batch is None else num_items_in_batch)}

    def summed_loss(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, head: str
    ) -> tuple[Tensor, int]:
        """The sum over labelled tokens, or sequences, and their number."""
        hidden = self.backbone(input_ids, attention_mask=attention_mask).last_hidden_state
        if self.accepts_loss_kwargs:
            logits, labels = self.heads[head](hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        else:
            weights = attention_mask / attention_mask.sum(1, keepdim=True)
            logits = self.heads[head]((hidden * weights.unsqueeze(2)).sum(1))
        total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return total, int((labels != IGNORED).sum())


def build_model(case: TrainerCase, own: str) -> Sequences:
    """The model of one job; both begin with the same weights."""
    torch.manual_seed(0)
    return Sequences(("h1", "h2"), own, case.tokens)


def build_dataset(case: TrainerCase, head: str) -> list[dict[str, Tensor]]:
    """Sequences of 3 to 9 tokens, some of them without a label."""
    generator = torch.Generator().manual_seed(1 if head == "h1" else 2)
    samples = []
    for _ in range(NUM_SAMPLES[head]):
        length = int(torch.randint(3, 10, (), generator=generator))
        tokens = torch.randint(VOCABULARY, (length,), generator=generator)
        labels = torch.randint(NUM_CLASSES, (), generator=generator)
        if case.tokens:
            labels = tokens.clone()
            # The first one too: not all versions of the Trainer leave it out of what they count.
            labels[: 1 + int(torch.randint(length - 1, (), generator=generator))] = IGNORED
        samples.append({"input_ids": tokens, "labels": labels})
    return samples


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, padded at the end."""
    tokens = [sample["input_ids"] for sample in samples]
    labels = [sample["labels"] for sample in samples]
    return {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        if labels[0].dim()
        else torch.stack(labels),
    }


def windows(case: TrainerCase, head: str, num_processes: int) -> Iterator[list[dict[str, Tensor]]]:
    """The batches that each optimizer step of a job is about, over its ranks and micro-batches."""
    samples = build_dataset(case, head)
    accumulation = case.accumulation if head == "h1" else case.donor_accumulation
    size = BATCH_SIZE[head] * num_processes * accumulation
    while True:
        for start in range(0, len(samples), size):
            yield [collate(samples[start : start + size])]


def train_jointly(
    case: TrainerCase, num_processes: int, donor_weight: float = DONOR_WEIGHT
) -> dict[str, Tensor]:
    """The receiver's final weights, as one process would have trained them."""
    return train_by_hand(
        build_model(case, "h1"),
        windows(case, "h1", num_processes),
        windows(case, "h2", 1),
        case.num_steps(num_processes),
        donor_weight=donor_weight,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
    )


def train_by_hand(
    model: Sequences,
    own: Iterable[list[dict[str, Tensor]]],
    donated: Iterable[list[dict[str, Tensor]]],
    num_steps: int,
    *,
    donor_weight: float,
    learning_rate: float,
    weight_decay: float,
    max_grad_norm: float,
) -> dict[str, Tensor]:
    """The weights after steps on the mean of each window's losses, with a Trainer's defaults."""
    named = list(model.named_parameters())
    decays = ["bias" not in name and ".ln_" not in name for name, _ in named]
    groups = [
        {
            "params": [p for (_, p), mine in zip(named, decays, strict=True) if mine == decayed],
            "weight_decay": weight_decay * decayed,
        }
        for decayed in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    for step, window in enumerate(itertools.islice(zip(own, donated, strict=False), num_steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / num_steps)
        optimizer.zero_grad()
        for head, batches, weight in zip(("h1", "h2"), window, (1.0, donor_weight), strict=True):
            if weight:
                parts = [model.summed_loss(**batch, head=head) for batch in batches]
                total = torch.stack([total for total, _ in parts]).sum()
                (weight * total / sum(count for _, count in parts)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
