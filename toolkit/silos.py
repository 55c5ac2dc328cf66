"""A user's own labelled images as a silo: a data set of the hub, or files on this machine."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetsError
from PIL import Image

from toolkit.bundled import load_task
from toolkit.data import HEADS, NO_LABEL, FloatArray, Task, check_labels, make_dataset
from toolkit.models import build_model
from toolkit.pretrained import with_pretrained_backbone

# What `load_dataset` calls the format of a single file, by suffix.
_FILE_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
_FILE_FORMATS |= {".json": "json", ".jsonl": "json"}
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # of red, green, blue (ITU-R BT.601)


@dataclass(frozen=True, kw_only=True, slots=True)
class SiloSource:
    """Where a silo lies.

    Attributes:
        dataset_name: a hub id; or the path of a parquet, arrow, csv or json file, of a directory
            written by ``save_to_disk``, or of a directory that ``load_dataset`` understands, such
            as an image folder.
        config_name: the data set's configuration, where it has several.
        image_column: images: encoded, paths of image files, or arrays as ``to_pixels`` takes them.
        label_column: class numbers.
        split: the rows to train on.
        eval_split: the rows to evaluate on; None for no evaluation.
    """

    dataset_name: str
    config_name: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    split: str = "train"
    eval_split: str | None = None


def load_data(args: argparse.Namespace, *heads: str) -> Task:
    """What the parsed flags of ``data_arguments()`` ask for: a bundled task, or own data.

    And a pretrained backbone, in place of the task's own.

    Args:
        args: also with ``seed``; for two heads, with the ``donor_`` flags of ``recipes/joint.py``.
        heads: whose labels this job has; the second one's data are the ``donor_`` ones.

    Raises:
        ValueError: for data or a backbone that do not fit the flags.
    """
    task = (
        load_task(args.task, seed=args.seed)
        if args.dataset_name is None
        else _own_data(args, heads)
    )
    if args.model_name_or_path is None:
        return task
    return with_pretrained_backbone(task, args.model_name_or_path)


def _own_data(args: argparse.Namespace, heads: Sequence[str]) -> Task:
    num_classes = dict(zip(HEADS, args.num_classes, strict=False))
    if absent := [head for head in heads if head not in num_classes]:
        raise ValueError(f"--num_classes has no number for {absent[0]}: give one for each head")
    sources = {}
    for head, prefix in zip(heads, ("", "donor_"), strict=False):
        sources[head] = SiloSource(
            dataset_name=getattr(args, f"{prefix}dataset_name"),
            config_name=getattr(args, f"{prefix}dataset_config_name"),
            image_column=getattr(args, f"{prefix}image_column"),
            label_column=getattr(args, f"{prefix}label_column"),
            split=args.dataset_split,
            eval_split=args.eval_split,
        )
    return own_task(sources, num_classes, tuple(args.image_shape) if args.image_shape else None)


def own_task(
    sources: dict[str, SiloSource],
    num_classes: dict[str, int],
    image_shape: tuple[int, int, int] | None = None,
) -> Task:
    """A task made of the silos that this job holds.

    Args:
        sources: by head.
        num_classes: of every head, including those that this job has no labels for.
        image_shape: (C, H, W) to convert every image to; None for that of the first one.
    """
    train, images, labels = {}, [], []
    for head, source in sources.items():
        train[head] = load_silo(source, source.split, head, num_classes[head], image_shape)
        image_shape = train[head].features["inputs"].shape
        if source.eval_split is not None:
            rows = load_silo(source, source.eval_split, head, num_classes[head], image_shape)[:]
            images.append(rows["inputs"].numpy())
            labels.append((head, rows[head].numpy()))
    assert image_shape is not None
    columns = {
        head: np.concatenate(
            [column if name == head else np.full_like(column, NO_LABEL) for name, column in labels]
            or [np.empty(0, dtype=np.int64)]
        )
        for head in num_classes
    }
    empty = np.empty((0, *image_shape), dtype=np.float32)
    return Task(
        name="+".join(source.dataset_name for source in sources.values()),
        build_model=partial(build_model, image_shape),
        num_classes=num_classes,
        train=train,
        evaluation=make_dataset(np.concatenate([empty, *images]), columns),
    )


def load_silo(
    source: SiloSource,
    split: str,
    head: str,
    num_classes: int,
    image_shape: tuple[int, int, int] | None = None,
) -> Dataset:
    """One split of a silo in this package's columns: ``inputs`` and ``head``.

    Where the data name their classes (``ClassLabel``), so does ``head``.

    Args:
        source: where it lies.
        split: which rows of it.
        head: whose labels they are.
        num_classes: of that head.
        image_shape: (C, H, W) to convert every image to; None for that of the first one.

    Raises:
        ValueError: for a missing file, split or column, an image that cannot be read, or a label
            that is no class number.
    """
    rows = _open(source, split)
    for column, flag in (
        (source.image_column, "--image_column"),
        (source.label_column, "--label_column"),
    ):
        if column not in rows.column_names:
            raise ValueError(
                f"{source.dataset_name} has no column {column!r}; it has {rows.column_names}. "
                f"Name the right one with {flag}"
            )
    if not len(rows):
        raise ValueError(f"split {split!r} of {source.dataset_name} has no rows")
    labels = rows.with_format(None)[source.label_column][:]
    check_labels(labels, num_classes, head)
    images: list[FloatArray] = []
    for row, value in enumerate(rows.with_format(None)[source.image_column]):
        try:
            images.append(to_pixels(value, image_shape))
        except (ValueError, OSError) as error:
            raise ValueError(f"image in row {row} of {source.dataset_name}: {error}") from error
        image_shape = image_shape or images[0].shape
    feature = rows.features[source.label_column]
    names = {head: feature.names} if isinstance(feature, ClassLabel) else None
    return make_dataset(np.stack(images), {head: np.array(labels, dtype=np.int64)}, names)


def _open(source: SiloSource, split: str) -> Dataset:
    path = Path(source.dataset_name)
    if path.is_file():
        if path.suffix not in _FILE_FORMATS:
            raise ValueError(
                f"{path} has none of the suffixes {list(_FILE_FORMATS)}; convert it, or give the "
                "directory that holds it"
            )
        if split != "train":
            raise ValueError(
                f"{path} is one file and has no split {split!r}, only 'train'. Give a directory "
                "with one file per split"
            )
        builder = _FILE_FORMATS[path.suffix]
        with _explained(path):
            return load_dataset(builder, data_files={"train": str(path)}, split="train")
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        with _explained(path):
            saved = load_from_disk(str(path))
        splits = saved if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}
        if split not in splits:
            raise ValueError(f"{path} has no split {split!r}; it has {list(splits)}")
        return splits[split]
    with _explained(path):
        return load_dataset(source.dataset_name, source.config_name, split=split)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say what could not be read, which not every error of the library does."""
    try:
        yield
    except (OSError, ValueError, DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        if path.exists():
            raise ValueError(f"the data set {path} cannot be read: {cause or error}") from error
        raise ValueError(
            f"the data set {path} is neither a file or directory here, nor to be had from the "
            f"hub: {error}. Give the path of one that exists, or a hub id"
        ) from error


def to_pixels(value: Any, shape: tuple[int, int, int] | None = None) -> FloatArray:
    """An image as float32 (C, H, W) in [0, 1], C = 1 or 3.

    Args:
        value: a PIL image, its encoded form (``{"bytes": ...}``), the path of an image file, or an
            array or nested list (H, W), (C, H, W) or, where the first is impossible, (H, W, C):
            whole numbers are divided by 255 (``uint16`` by 65535), others must lie in [0, 1].
        shape: (C, H, W) to convert it to: to grey or to RGB, and resized (bilinear).

    Raises:
        ValueError: for another shape, or numbers out of range.
    """
    if isinstance(value, dict):
        value = io.BytesIO(value["bytes"]) if value.get("bytes") else value.get("path")
    if isinstance(value, (str, Path, io.BytesIO)):
        value = Image.open(value)
    if isinstance(value, Image.Image) and not value.mode.startswith("I;16"):
        value = value.convert("L" if value.mode in ("1", "L", "LA") else "RGB")
    array = np.asarray(value)
    if isinstance(value, Image.Image) and array.ndim == 3:
        array = array.transpose(2, 0, 1)
    if array.dtype.kind not in "buif":
        raise ValueError(f"expected numbers, got {type(value).__name__} of dtype {array.dtype}")
    top = {"b": 1, "f": 1}.get(array.dtype.kind, 65535 if array.dtype == np.uint16 else 255)
    if not array.size or not 0 <= array.min() <= array.max() <= top:
        raise ValueError(f"pixels of dtype {array.dtype} must lie between 0 and {top}")
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and array.shape[0] not in (1, 3):
        array = array.transpose(2, 0, 1)
    if array.ndim != 3 or array.shape[0] not in (1, 3):
        raise ValueError(
            f"shape {np.shape(value)} is none of (H, W), (C, H, W), (H, W, C) for C 1, 3"
        )
    pixels = (array / top).astype(np.float32)
    return pixels if shape is None else _convert(pixels, shape)


def _convert(pixels: FloatArray, shape: tuple[int, int, int]) -> FloatArray:
    channels, height, width = shape
    if channels < len(pixels):
        pixels = np.tensordot(_LUMA, pixels, axes=1)[None]
    elif channels > len(pixels):
        pixels = np.repeat(pixels, channels, axis=0)
    if pixels.shape[1:] == (height, width):
        return pixels
    planes = [
        Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR)
        for plane in pixels
    ]
    return np.stack([np.asarray(plane, dtype=np.float32) for plane in planes])
