"""The bundled tasks: columns, splits, and no sample in two silos."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from toolkit.bundled import load_task
from toolkit.data import Task


def rows(task: Task) -> list[Tensor]:
    """All images of receiver's silo, donor's silo and evaluation set."""
    datasets = (task.train["h1"], task.train["h2"], task.evaluation)
    return [dataset[:]["inputs"] for dataset in datasets]


@pytest.mark.parametrize("name", ["digits", "overlap"])
def test_columns(name: str) -> None:
    task = load_task(name)
    assert task.train["h1"].column_names == ["inputs", "h1"]
    assert task.train["h2"].column_names == ["inputs", "h2"]
    heads = ["h1", "h2", "h3"] if name == "digits" else ["h1", "h2"]
    assert task.evaluation.column_names == ["inputs", *heads]
    for images in rows(task):
        assert images.shape[1:] == ((1, 8, 8) if name == "digits" else (1, 12, 12))
        assert images.dtype == torch.float32
        assert float(images.min()) == 0.0
        assert float(images.max()) == 1.0
    for head, num_classes in task.num_classes.items():
        assert set(task.evaluation[:][head].tolist()) == set(range(num_classes))


def test_digits_uses_every_source_image_once() -> None:
    used = torch.cat(rows(load_task("digits"))).flatten(1).double().numpy() * 16
    expected = load_digits().data
    assert sorted(map(tuple, used.tolist())) == sorted(map(tuple, expected.tolist()))


def test_overlap_shares_no_source_image() -> None:
    # Rows of the upper left digit that the other one does not cover tell which image it was.
    seen = [
        {image[0, :4, :8].numpy().tobytes() for image in part}
        for part in rows(load_task("overlap"))
    ]
    everything = load_digits().images[:, :4] / 16
    ambiguous = {
        image.astype(np.float32).tobytes()
        for image, count in zip(*np.unique(everything, axis=0, return_counts=True), strict=True)
        if count > 1
    }
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert len(seen[a]) > 400
        assert not (seen[a] & seen[b]) - ambiguous


def test_split_follows_the_seed() -> None:
    first, same, other = (load_task("digits", seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(rows(first), rows(same), strict=True))
    assert not torch.equal(rows(first)[0], rows(other)[0])


def test_h3_of_digits_tells_what_h2_does_not() -> None:
    task = load_task("digits")
    pairs, odd = (task.train[head][:] for head in ("h2", "h3"))
    assert torch.equal(pairs["inputs"], odd["inputs"])
    assert set(odd["h3"].tolist()) == {0, 1}
    rest = task.evaluation[:]
    assert torch.equal(2 * rest["h2"] + rest["h3"], rest["h1"])


def test_a_head_without_labels() -> None:
    assert load_task("digits").classes_of(["h3", "h1"]) == {"h3": 2, "h1": 10}
    with pytest.raises(ValueError, match="'overlap' has classes for h1, h2, none for h3: take"):
        load_task("overlap").classes_of(["h1", "h3"])


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match="'mnist' is unknown; choose one of"):
        load_task("mnist")
