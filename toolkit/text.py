"""Snippets of Python's standard library: which module is it from, which chapter of the manual?"""

from __future__ import annotations

import re
import sysconfig
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from toolkit.data import IntArray, Task, make_dataset
from toolkit.models import PADDING, build_text_model

# Chapters of the Python Library Reference, and two modules that each describes.
CHAPTERS = {
    "Internet Data Handling": ("email", "mailbox"),
    "Internet Protocols and Support": ("http", "urllib"),
    "Concurrent Execution": ("multiprocessing", "threading"),
    "Data Compression and Archiving": ("tarfile", "zipfile"),
    "Development Tools": ("unittest", "doctest"),
}
NUM_TOKENS, MAX_WORDS = 2048, 48
_MIN_WORDS = 8
_MAX_SNIPPETS = 320  # of each module, so that classes are about equally frequent
_NUM_H1, _NUM_EVALUATION = 200, 600  # snippets; the rest is the donor's
# Words, also inside camelCase and snake_case; numbers; each other character that is no blank.
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\sA-Za-z\d_]")


def text_task(seed: int, directory: Path | None = None) -> Task:
    """Tell where a snippet of source, with its comments and docstrings, was taken from.

    ``h1`` tells the module, one of ten, and has 200 labelled snippets; ``h2`` tells the chapter of
    the manual that describes it, one of five, and has about 2,200. The donor's coarse labels
    improve ``h1``. 600 other snippets are for evaluation. No two are the same.

    A snippet is what stands between blank lines, its first 48 words in lower case. A word's number
    is its hash (Weinberger et al., Feature Hashing for Large Scale Multitask Learning, arXiv
    0902.2206), so that both jobs number words alike without having seen each other's text.

    Other versions of Python have other sources: both jobs must run the same one.

    Args:
        seed: of the split.
        directory: with the modules; None for this interpreter's standard library.

    Raises:
        ValueError: where a module's sources are not there.
    """
    directory = directory or Path(sysconfig.get_path("stdlib"))
    modules = [module for pair in CHAPTERS.values() for module in pair]
    found = [_snippets(directory, module) for module in modules]
    num_modules = Counter(snippet for snippets in found for snippet in snippets)
    rng = np.random.default_rng(seed)
    texts: list[tuple[int, ...]] = []
    labels: list[int] = []
    for label, snippets in enumerate(found):
        own = [snippet for snippet in snippets if num_modules[snippet] == 1]
        chosen = rng.permutation(len(own))[:_MAX_SNIPPETS]
        texts += [own[number] for number in chosen]
        labels += [label] * len(chosen)
    tokens = np.full((len(texts), MAX_WORDS), PADDING, dtype=np.int64)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    order = rng.permutation(len(texts))
    own_rows, donor_rows, rest = np.split(order, [_NUM_H1, len(texts) - _NUM_EVALUATION])
    names = {"h1": modules, "h2": list(CHAPTERS)}
    columns: dict[str, IntArray] = {"h1": np.array(labels), "h2": np.array(labels) // 2}
    return Task(
        name="text",
        build_model=partial(build_text_model, NUM_TOKENS, MAX_WORDS),
        num_classes={"h1": len(modules), "h2": len(CHAPTERS)},
        train={
            head: make_dataset(tokens[rows], {head: columns[head][rows]}, {head: names[head]})
            for head, rows in {"h1": own_rows, "h2": donor_rows}.items()
        },
        evaluation=make_dataset(
            tokens[rest], {head: column[rest] for head, column in columns.items()}
        ),
    )


def _snippets(directory: Path, module: str) -> list[tuple[int, ...]]:
    """The different snippets of a module without its tests, as token numbers."""
    package = directory / module
    paths = sorted(package.rglob("*.py")) or [package.with_suffix(".py")]
    found: dict[tuple[int, ...], None] = {}
    for path in paths:
        if not {"test", "tests"}.isdisjoint(path.relative_to(directory).parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ValueError(
                f"no source of Python's module {module!r} in {directory}: --task text needs an "
                "interpreter that has its standard library as files"
            ) from None
        for block in re.split(r"\n\s*\n", source):
            words = _WORD.findall(block)[:MAX_WORDS]
            if len(words) >= _MIN_WORDS:
                found[tuple(map(_token, words))] = None
    return list(found)


def _token(word: str) -> int:
    """A number from 1 to NUM_TOKENS - 1."""
    return 1 + zlib.crc32(word.lower().encode()) % (NUM_TOKENS - 1)
