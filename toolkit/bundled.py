"""The bundled tasks: what a donor and a receiver can learn from without downloading anything.

``digits`` and ``overlap`` are made of scikit-learn's 1,797 digits (8 x 8 pixels), ``text`` of the
source files of Python's standard library.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from toolkit.data import FloatArray, IntArray, Task, check_labels, make_dataset
from toolkit.models import build_model
from toolkit.text import text_task

TASKS = ("digits", "overlap", "text")

# What the classes are called.
_DIGITS = [str(digit) for digit in range(10)]
_PAIRS = [f"{2 * pair} or {2 * pair + 1}" for pair in range(5)]
# digits: images with a label for h1 and for h2; the rest is for evaluation.
_NUM_DIGITS_H1, _NUM_DIGITS_H2 = 80, 1200
# overlap: source images, and what is composed of them, for h1, h2 and evaluation.
_OVERLAP_POOLS, _OVERLAP_PAIRS = (600, 600, 597), (2000, 2000, 1000)
_OVERLAP_SHIFT = 4  # pixels by which the second digit lies further right and further down


def load_task(name: str, *, seed: int = 0) -> Task:
    """A bundled task.

    - ``digits``: ``h1`` tells the digit and has 80 labelled images; ``h2`` tells the pair of
      digits (0 or 1, 2 or 3, ...) and has 1,200. The donor's coarse labels improve ``h1``. ``h3``
      tells whether the digit is odd, for the same images as ``h2``.
    - ``overlap``: two digits overlaid. ``h1`` tells the upper left one, ``h2`` the lower right
      one; each silo has 2,000 images.
    - ``text``: see :func:`toolkit.text.text_task`.

    No source image or text is in two of receiver's silo, donor's silo and evaluation set.

    Args:
        name: one of ``TASKS``.
        seed: of the split. Both jobs must use the same one, else their silos and evaluation sets
            overlap.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r} is unknown; choose one of {list(TASKS)}")
    if name == "text":
        return text_task(seed)
    from sklearn.datasets import load_digits  # slow to import, and not needed for --help

    bunch = load_digits()
    images = (bunch.images / 16.0).astype(np.float32)
    digits = bunch.target.astype(np.int64)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(digits))
    if name == "digits":
        parts = np.split(order, [_NUM_DIGITS_H1, _NUM_DIGITS_H1 + _NUM_DIGITS_H2])
        labels = {"h1": digits, "h2": digits // 2, "h3": digits % 2}
        samples = [
            (images[part, None], {head: column[part] for head, column in labels.items()})
            for part in parts
        ]
        names = {"h1": _DIGITS, "h2": _PAIRS, "h3": ["even", "odd"]}
    else:
        pools = np.split(order, np.cumsum(_OVERLAP_POOLS)[:-1])
        samples = [
            _overlay(images, digits, rng.choice(pool, size=(num_pairs, 2)))
            for pool, num_pairs in zip(pools, _OVERLAP_PAIRS, strict=True)
        ]
        names = {"h1": _DIGITS, "h2": _DIGITS}
    num_classes = {head: len(classes) for head, classes in names.items()}
    for head, size in num_classes.items():
        for _, columns in samples:
            check_labels(columns[head], size, head)
    (own_images, own), (donor_images, donor), (evaluation_images, evaluation) = samples
    train = {
        head: make_dataset(donor_images, {head: donor[head]}, {head: classes})
        for head, classes in names.items()
    }
    train["h1"] = make_dataset(own_images, {"h1": own["h1"]}, {"h1": names["h1"]})
    return Task(
        name=name,
        build_model=partial(build_model, own_images.shape[1:]),
        num_classes=num_classes,
        train=train,
        evaluation=make_dataset(evaluation_images, evaluation),
    )


def _overlay(
    images: FloatArray, digits: IntArray, pairs: IntArray
) -> tuple[FloatArray, dict[str, IntArray]]:
    """Lay image ``pairs[i, 1]`` over ``pairs[i, 0]``, shifted to the lower right; sum, clipped."""
    size, shift = images.shape[1], _OVERLAP_SHIFT
    canvas = np.zeros((len(pairs), 1, size + shift, size + shift), dtype=np.float32)
    canvas[:, 0, :size, :size] = images[pairs[:, 0]]
    canvas[:, 0, shift:, shift:] += images[pairs[:, 1]]
    labels = {"h1": digits[pairs[:, 0]], "h2": digits[pairs[:, 1]]}
    return np.minimum(canvas, 1.0), labels
