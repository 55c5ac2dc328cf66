"""Pretrained backbones for images, by ``transformers``: of the hub, or from a directory."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor, nn

from toolkit.data import Task
from toolkit.models import MultiHeadModel, seeded


class PretrainedBackbone(nn.Module):
    """A model of ``transformers`` whose features are the mean of its last hidden states.

    Args:
        model: takes ``pixel_values`` and gives states (N, T, F), or (N, F, H, W).
        mean: of each channel of the images that it was trained on.
        std: their standard deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model = model
        # Not persistent: both jobs read them where they read the model.
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.register_buffer("std", std[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, F) of images (N, C, H, W) in [0, 1]."""
        states = self.model(pixel_values=(images - self.mean) / self.std).last_hidden_state
        features: Tensor = states.mean(dim=1) if states.ndim == 3 else states.mean(dim=(2, 3))
        return features


def with_pretrained_backbone(task: Task, name_or_path: str) -> Task:
    """The same task for another backbone.

    Args:
        task: of images.
        name_or_path: a hub id, or a directory written by ``save_pretrained``.

    Raises:
        ValueError: for a task of texts, which has numbers of its own for words.
    """
    silo = next(iter(task.train.values()))
    shape = getattr(silo.features["inputs"], "shape", ())
    if len(shape) != 3:
        raise ValueError(
            f"--model_name_or_path is of images, and {task.name!r} has texts: take another --task, "
            "or --dataset_name"
        )
    build = partial(build_pretrained_model, name_or_path, tuple(shape))
    return dataclasses.replace(task, build_model=build)


def build_pretrained_model(
    name_or_path: str, image_shape: tuple[int, int, int], num_classes: dict[str, int], *, seed: int
) -> MultiHeadModel:
    """A pretrained backbone, and linear heads with random weights.

    What its features do not depend on, such as a pooler or the token of masked patches, is frozen:
    DistributedDataParallel would wait for its gradient. BatchNorm and dropout stay as they are.

    Args:
        name_or_path: a hub id, or a directory written by ``save_pretrained``.
        image_shape: (C, H, W) in pixels.
        num_classes: by head, its number of classes.
        seed: of the heads, and of what the pretrained weights lack.

    Raises:
        ValueError: without the package ``transformers``, or for a model that is not there or does
            not take such images.
    """
    backbone = seeded(seed, "backbone", partial(_load, name_or_path, image_shape[0]))
    try:
        features = backbone.eval()(torch.zeros(1, *image_shape))
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name_or_path} takes no images of shape {image_shape}: {error}. Give the "
            "--image_shape C H W that it was trained on, with --dataset_name, or another model"
        ) from error
    features.sum().backward()
    for parameter in backbone.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    heads = {
        name: seeded(seed, f"heads.{name}", partial(nn.Linear, features.shape[1], size))
        for name, size in num_classes.items()
    }
    return MultiHeadModel(backbone.train(), heads)


def _load(name_or_path: str, num_channels: int) -> nn.Module:
    try:  # here: it takes seconds to import
        from transformers import AutoModel
        from transformers.image_processing_base import ImageProcessingMixin
    except ImportError as error:
        raise ValueError(
            f"a pretrained backbone needs transformers ({error}): "
            "pip install 'gradient-bridge[transformers]'"
        ) from error
    try:
        model = AutoModel.from_pretrained(name_or_path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model_name_or_path {name_or_path}: {error}") from error
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path)
    except OSError:  # trained on images as they are
        settings = {}
    is_normalized = settings.get("do_normalize", True)
    mean = torch.tensor((is_normalized and settings.get("image_mean")) or [0.0])
    std = torch.tensor((is_normalized and settings.get("image_std")) or [1.0])
    if len(mean) not in (1, num_channels):
        raise ValueError(
            f"{name_or_path} was trained on images of {len(mean)} channels, and these have "
            f"{num_channels}: give --image_shape {len(mean)} H W, with --dataset_name"
        )
    return PretrainedBackbone(model, mean.expand(num_channels), std.expand(num_channels))
