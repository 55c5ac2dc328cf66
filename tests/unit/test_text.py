"""Snippets of source files: labels, splits, token numbers, and the transformer that reads them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from toolkit.bundled import load_task
from toolkit.data import Task
from toolkit.models import PADDING, build_text_model
from toolkit.text import CHAPTERS, MAX_WORDS, NUM_TOKENS, text_task

MODULES = [module for pair in CHAPTERS.values() for module in pair]


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("text", seed=3)


def parts(task: Task) -> list[Tensor]:
    """The tokens of receiver's silo, donor's silo and evaluation set."""
    datasets = (task.train["h1"], task.train["h2"], task.evaluation)
    return [dataset[:]["inputs"] for dataset in datasets]


def test_columns_of_the_real_sources(task: Task) -> None:
    own, donor, evaluation = parts(task)
    assert (len(own), len(evaluation)) == (200, 600)
    assert len(donor) > 1500
    for tokens in (own, donor, evaluation):
        assert (tokens.dtype, tokens.shape[1:]) == (torch.int64, (MAX_WORDS,))
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < NUM_TOKENS
        assert bool((tokens[:, :8] != PADDING).all())
        ended = tokens == PADDING
        assert torch.equal(ended, ended.cummax(dim=1).values), "padding is at the end only"
    assert task.train["h1"].column_names == ["inputs", "h1"]
    assert task.train["h2"].column_names == ["inputs", "h2"]
    labels = task.evaluation[:]
    assert torch.equal(labels["h2"], labels["h1"] // 2)
    # No class is rare, so that a constant answer is hardly ever right.
    assert float(torch.bincount(labels["h1"], minlength=10).max()) < 0.15 * 600
    assert int(torch.bincount(task.train["h1"][:]["h1"], minlength=10).min()) >= 5


def test_that_no_text_is_there_twice(task: Task) -> None:
    rows = [tuple(row) for tokens in parts(task) for row in tokens.tolist()]
    assert len(set(rows)) == len(rows)


def test_that_the_split_follows_the_seed(task: Task) -> None:
    same, other = text_task(3), text_task(4)
    assert all(torch.equal(a, b) for a, b in zip(parts(task), parts(same), strict=True))
    assert not torch.equal(parts(task)[0], parts(other)[0])


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Ten modules with 90 snippets each, of which one is in all of them and one is too short."""
    common = "one two three four five six seven eight everywhere"
    for number, module in enumerate(MODULES):
        own = [f"# {module} camelCase SNAKE_case {i} {number} {7 * i}" for i in range(88)]
        text = "\n\n".join([common, *own, "too short", own[0]])
        if number % 2:
            (tmp_path / f"{module}.py").write_text(text)
        else:
            (tmp_path / module / "tests").mkdir(parents=True)
            (tmp_path / module / "__init__.py").write_text(text)
            (tmp_path / module / "tests" / "__init__.py").write_text(f"# {module} test" * 9)
    return tmp_path


def test_that_labels_are_where_a_snippet_comes_from(sources: Path) -> None:
    task = text_task(0, sources)
    assert sum(map(len, parts(task))) == 88 * 10
    # By the hash of the module's name, the second word of each snippet; the first is "#".
    names: dict[int, set[int]] = {}
    for rows in (task.train["h1"][:], task.evaluation[:]):
        for token, label in zip(rows["inputs"][:, 1].tolist(), rows["h1"].tolist(), strict=True):
            names.setdefault(token, set()).add(label)
    assert sorted(map(list, names.values())) == [[label] for label in range(10)]
    donor = task.train["h2"][:]
    for token, label in zip(donor["inputs"][:, 1].tolist(), donor["h2"].tolist(), strict=True):
        assert names[token] <= {2 * label, 2 * label + 1}


def test_that_camel_and_snake_case_are_words_in_lower_case(sources: Path) -> None:
    for tokens in parts(text_task(0, sources)):
        assert torch.equal(tokens[:, 3], tokens[:, 5])  # of camelCase and of SNAKE_case


def test_that_the_order_of_a_directory_does_not_matter(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = parts(text_task(0, sources))
    (sources / MODULES[0] / "other.py").write_text("a b c d e f g h i j k")
    found = [parts(text_task(0, sources))]
    in_order = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda *args: sorted(in_order(*args), reverse=True))
    found.append(parts(text_task(0, sources)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(first[0], found[0][0])


def test_missing_sources(sources: Path) -> None:
    (sources / "doctest.py").unlink()
    with pytest.raises(
        ValueError, match=r"no source of Python's module 'doctest' in .*--task text"
    ):
        text_task(0, sources)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs transformers .*gradient-bridge\[transformers\]"):
        build_text_model(9, 5, {"h1": 2}, seed=0)


def test_the_transformer() -> None:
    pytest.importorskip("transformers")
    model = build_text_model(50, 9, {"h1": 3, "h2": 2}, seed=1).double()
    tokens = torch.randint(1, 50, (4, 9))
    for row, length in enumerate((9, 1, 5, 8)):
        tokens[row, length:] = PADDING
    logits = model(tokens)
    assert {head: value.shape for head, value in logits.items()} == {"h1": (4, 3), "h2": (4, 2)}
    for row, length in enumerate((9, 1, 5, 8)):  # padding, and other texts, have no influence
        alone = model(tokens[row : row + 1, :length])["h2"]
        torch.testing.assert_close(logits["h2"][row : row + 1], alone, atol=1e-12, rtol=0)
    model.eval()
    torch.testing.assert_close(model(tokens)["h1"], logits["h1"], atol=0, rtol=0)  # no dropout
    logits["h2"].sum().backward()
    assert all(parameter.grad is not None for parameter in model.backbone.parameters())

    before = torch.random.get_rng_state()
    donor = build_text_model(50, 9, {"h2": 2}, seed=1).double().state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(donor[name], model.state_dict()[name]) for name in donor)
