"""Users' own images: every kind of local path, every kind of pixel, and clear errors."""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image

from toolkit.data import NO_LABEL
from toolkit.silos import SiloSource, load_data, load_silo, own_task, to_pixels

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
LABELS = [2, 0, 1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is derived from the files of one test out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def images() -> list[Image.Image]:
    return [Image.fromarray(GREY + 10 * number) for number in LABELS]


def dataset() -> Dataset:
    return Dataset.from_dict({"picture": images(), "kind": LABELS})


def source(path: Path) -> SiloSource:
    return SiloSource(dataset_name=str(path), image_column="picture", label_column="kind")


def write_parquet(path: Path) -> Path:
    dataset().to_parquet(path / "silo.parquet")
    return path / "silo.parquet"


def write_nested_lists(path: Path) -> Path:
    columns = {"picture": [np.asarray(image).tolist() for image in images()], "kind": LABELS}
    Dataset.from_dict(columns).to_json(path / "silo.json")
    return path / "silo.json"


def write_csv(path: Path) -> Path:
    names = [str(path / f"{number}.png") for number in range(len(LABELS))]
    for name, image in zip(names, images(), strict=True):
        image.save(name)
    Dataset.from_dict({"picture": names, "kind": LABELS}).to_csv(path / "silo.csv")
    return path / "silo.csv"


def write_saved(path: Path) -> Path:
    dataset().save_to_disk(path / "saved")
    return path / "saved"


def write_saved_splits(path: Path) -> Path:
    DatasetDict(train=dataset(), test=dataset().select([0])).save_to_disk(path / "splits")
    return path / "splits"


def write_arrow(path: Path) -> Path:
    return next(write_saved(path).glob("*.arrow"))


@pytest.mark.parametrize(
    "write",
    [write_parquet, write_nested_lists, write_csv, write_saved, write_saved_splits, write_arrow],
)
def test_local_paths(write, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    silo = load_silo(source(write(tmp_path)), "train", "h1", 3)
    assert silo.column_names == ["inputs", "h1"]
    expected = torch.stack([torch.tensor(np.asarray(image)) for image in images()])[:, None] / 255
    assert torch.allclose(silo[:]["inputs"], expected, atol=1e-7)
    assert silo[:]["h1"].tolist() == LABELS


def test_image_folder(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number, kind in enumerate(("cat", "dog")):
            folder = tmp_path / "folder" / split / kind
            folder.mkdir(parents=True)
            Image.fromarray(GREY + number).save(folder / "0.png")
    folder_source = SiloSource(dataset_name=str(tmp_path / "folder"), eval_split="test")
    task = own_task({"h2": folder_source}, {"h1": 4, "h2": 2}, (1, 3, 4))
    assert task.train["h2"].features["inputs"].shape == (1, 3, 4)
    assert task.train["h2"][:]["h2"].tolist() == [0, 1]
    assert task.evaluation[:]["h2"].tolist() == [0, 1]
    assert task.evaluation[:]["h1"].tolist() == [NO_LABEL, NO_LABEL]


def test_own_task_without_evaluation(tmp_path: Path) -> None:
    path = source(write_parquet(tmp_path))
    task = own_task({"h1": path, "h2": path}, {"h1": 3, "h2": 4})
    assert task.train["h1"].features["inputs"].shape == (1, 6, 8)
    assert list(task.train) == ["h1", "h2"]
    assert len(task.evaluation) == 0


def test_a_head_without_a_number_of_classes() -> None:
    args = argparse.Namespace(dataset_name="x", num_classes=[3, 2])
    with pytest.raises(ValueError, match="--num_classes has no number for h3"):
        load_data(args, "h3")


def test_missing_column(tmp_path: Path) -> None:
    wrong = SiloSource(dataset_name=str(write_parquet(tmp_path)), image_column="img")
    with pytest.raises(
        ValueError, match=r"no column 'img'; it has \['picture', 'kind'\].*--image_c"
    ):
        load_silo(wrong, "train", "h1", 3)


def test_label_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label 2 in row 0 is no class of head 'h1', which has 2"):
        load_silo(source(write_parquet(tmp_path)), "train", "h1", 2)


def test_missing_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no split 'test', only 'train'"):
        load_silo(source(write_parquet(tmp_path)), "test", "h1", 3)
    with pytest.raises(ValueError, match=r"has no split 'valid'; it has \['train', 'test'\]"):
        load_silo(source(write_saved_splits(tmp_path)), "valid", "h1", 3)


def test_unreadable_image_names_its_row(tmp_path: Path) -> None:
    columns = {"picture": [[[0.5]], [[1.5]]], "kind": [0, 0]}
    Dataset.from_dict(columns).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"row 1 of .*bad.parquet: pixels .* between 0 and 1"):
        load_silo(source(tmp_path / "bad.parquet"), "train", "h1", 3)


@pytest.mark.parametrize(
    ("value", "shape", "first"),
    [
        (Image.new("RGB", (4, 3), (255, 0, 51)), (3, 3, 4), [1.0, 0.0, 0.2]),
        (Image.new("RGBA", (4, 3), (255, 0, 51, 9)), (3, 3, 4), [1.0, 0.0, 0.2]),
        (Image.new("1", (4, 3), 1), (1, 3, 4), [1.0]),
        (Image.fromarray(np.full((3, 4), 13107, dtype=np.uint16)), (1, 3, 4), [0.2]),
        (np.full((3, 4), 65535, dtype=np.uint16), (1, 3, 4), [1.0]),
        (np.full((5, 4, 3), 51, dtype=np.uint8), (3, 5, 4), [0.2] * 3),
        (np.full((1, 3, 4), 0.25), (1, 3, 4), [0.25]),
    ],
)
def test_to_pixels(value: object, shape: tuple[int, int, int], first: list[float]) -> None:
    pixels = to_pixels(value)
    assert pixels.shape == shape
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[:, 0, 0], first, atol=1e-6)


def test_to_pixels_converts() -> None:
    rgb = Image.new("RGB", (8, 6), (255, 255, 255))
    np.testing.assert_allclose(to_pixels(rgb, (1, 3, 4)), np.ones((1, 3, 4)), atol=1e-6)
    assert to_pixels(Image.fromarray(GREY), (3, 6, 8)).shape == (3, 6, 8)


@pytest.mark.parametrize("value", ["[1, 2]", np.zeros((2, 5, 7)), np.zeros(4), [["a"]], [[300]]])
def test_to_pixels_refuses(value: object) -> None:
    with pytest.raises((ValueError, OSError)):
        to_pixels(value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.json", '{"picture": [', "broken.json cannot be read: JSON"),
        ("broken.parquet", "no parquet", "broken.parquet cannot be read: "),
        ("empty.csv", "picture,kind\n", "empty.csv cannot be read: "),
        ("absent.parquet", None, "absent.parquet is neither a file or directory here, nor .* hub"),
    ],
)
def test_that_data_that_cannot_be_read_are_named(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_silo(source(path), "train", "h1", 3)
