"""Small networks for the recipes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

NUM_FEATURES = 48
_NUM_LENET_FEATURES = 50
_CHANNELS = (16, 32)
PADDING = 0  # the token number after the end of a text
_WIDTH, _NUM_LAYERS, _NUM_ATTENTION_HEADS = 64, 2, 2  # of the transformer
_GRID = 4  # the feature map is pooled to at most 4 x 4 (to fewer than 8 for odd sizes)


class MultiHeadModel(nn.Module):
    """A backbone and the heads that read its features.

    Args:
        backbone: maps inputs, such as images (N, C, H, W) or token numbers (N, T), to features
            (N, F).
        heads: by name, what maps features (N, F) to logits (N, K).
    """

    def __init__(self, backbone: nn.Module, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)

    def forward(self, inputs: Tensor, heads: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Logits of several heads from one pass through the backbone.

        Args:
            inputs: of N samples, as the backbone takes them; images in the parameters' dtype.
            heads: which heads; all by default. Heads left out cost nothing and get no gradient.

        Returns:
            By head, logits (N, K).

        Raises:
            KeyError: for a head that the model does not have.
        """
        features = self.backbone(inputs)
        names = list(self.heads) if heads is None else heads
        return {name: self.heads[name](features) for name in names}


class OneHead(nn.Module):
    """A backbone and one of its heads, whose logits it gives; parameters keep their names.

    Args:
        model: whose parts these are.
        head: name of the head.
    """

    def __init__(self, model: MultiHeadModel, head: str) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.heads = nn.ModuleDict({head: model.heads[head]})
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) for images (N, C, H, W)."""
        logits: Tensor = self.heads[self.head](self.backbone(images))
        return logits


def build_model(
    image_shape: tuple[int, int, int], num_classes: dict[str, int], *, seed: int
) -> MultiHeadModel:
    """A small convolutional backbone with one linear head per entry of ``num_classes``.

    No BatchNorm, and no dropout: the loss of a sample depends on that sample alone, so that sums
    of gradients add up exactly. About 30,000 parameters for 8 x 8 images.

    Every part draws its initial weights from a seed of its own. Models of the same ``seed`` and
    ``image_shape`` therefore begin with the same backbone, and with the same weights in every head
    that they have in common. The global random state is left alone.

    Args:
        image_shape: (C, H, W) in pixels, at least 4 x 4.
        num_classes: by head, its number of classes.
        seed: of the initial weights.

    Raises:
        ValueError: for images smaller than 4 x 4.
    """
    _, height, width = image_shape
    if min(height, width) < _GRID:
        raise ValueError(f"image_shape is {image_shape}; height and width must be at least {_GRID}")
    backbone = seeded(seed, "backbone", partial(_build_backbone, image_shape))
    heads = {
        name: seeded(seed, f"heads.{name}", partial(nn.Linear, NUM_FEATURES, size))
        for name, size in num_classes.items()
    }
    return MultiHeadModel(backbone, heads)


def build_lenet(
    image_shape: tuple[int, int, int], out_features: dict[str, int], seed: int
) -> MultiHeadModel:
    """Two convolutions (10 and 20 channels), each halved, and 50 features; heads that are linear.

    No BatchNorm, and a seed of its own for every part, as in :func:`build_model`.

    Args:
        image_shape: (C, H, W) in pixels, multiples of 4.
        out_features: by head.
        seed: of the initial weights.
    """
    backbone = seeded(seed, "backbone", partial(_build_lenet_backbone, image_shape))
    heads = {
        name: seeded(seed, f"heads.{name}", partial(nn.Linear, _NUM_LENET_FEATURES, size))
        for name, size in out_features.items()
    }
    return MultiHeadModel(backbone, heads)


class TextBackbone(nn.Module):
    """A transformer whose features are the mean of its last hidden states over a text's tokens.

    Args:
        transformer: an encoder of ``transformers``.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, tokens: Tensor) -> Tensor:
        """Features (N, F) of token numbers (N, T), which end in ``PADDING`` or do not."""
        mask = tokens != PADDING
        outputs = self.transformer(input_ids=tokens, attention_mask=mask.long())
        states = outputs.last_hidden_state.masked_fill(~mask[..., None], 0.0)
        features: Tensor = states.sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return features


def build_text_model(
    num_tokens: int, max_length: int, num_classes: dict[str, int], *, seed: int
) -> MultiHeadModel:
    """A DistilBERT of two layers, with random weights, and linear heads; no dropout.

    Width 64, two attention heads: 202,000 parameters for 2,048 tokens. A seed of its own for every
    part, as in :func:`build_model`.

    Args:
        num_tokens: V; tokens have the numbers 1 to V - 1.
        max_length: T, of a text in tokens.
        num_classes: by head, its number of classes.
        seed: of the initial weights.

    Raises:
        ValueError: without the package ``transformers``.
    """
    build_backbone = partial(_build_text_backbone, num_tokens, max_length)
    heads = {
        name: seeded(seed, f"heads.{name}", partial(nn.Linear, _WIDTH, size))
        for name, size in num_classes.items()
    }
    return MultiHeadModel(seeded(seed, "backbone", build_backbone), heads)


def _build_text_backbone(num_tokens: int, max_length: int) -> nn.Module:
    try:  # here: it takes seconds to import
        from transformers import DistilBertConfig, DistilBertModel
    except ImportError as error:
        raise ValueError(
            f"a text model needs transformers ({error}): "
            "pip install 'gradient-bridge[transformers]'"
        ) from error
    config = DistilBertConfig(
        vocab_size=num_tokens,
        max_position_embeddings=max_length,
        dim=_WIDTH,
        hidden_dim=2 * _WIDTH,
        n_layers=_NUM_LAYERS,
        n_heads=_NUM_ATTENTION_HEADS,
        pad_token_id=PADDING,
        dropout=0.0,
        attention_dropout=0.0,
    )
    return TextBackbone(DistilBertModel(config))


def _build_lenet_backbone(image_shape: tuple[int, int, int]) -> nn.Module:
    channels, height, width = image_shape
    return nn.Sequential(
        nn.Conv2d(channels, 10, kernel_size=3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(10, 20, kernel_size=3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20 * (height // 4) * (width // 4), _NUM_LENET_FEATURES),
        nn.ReLU(),
    )


def _build_backbone(image_shape: tuple[int, int, int]) -> nn.Module:
    channels, height, width = image_shape
    # The first convolution keeps the size, the second halves it (rounding up).
    sizes = ((height + 1) // 2, (width + 1) // 2)
    kernel = (max(1, sizes[0] // _GRID), max(1, sizes[1] // _GRID))
    num_pooled = _CHANNELS[1] * (sizes[0] // kernel[0]) * (sizes[1] // kernel[1])
    return nn.Sequential(
        nn.Conv2d(channels, _CHANNELS[0], kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(_CHANNELS[0], _CHANNELS[1], kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(kernel),
        nn.Flatten(),
        nn.Linear(num_pooled, NUM_FEATURES),
        nn.ReLU(),
    )


def seeded(seed: int, part: str, build: Callable[[], nn.Module]) -> nn.Module:
    """Build one part of a model from a random seed of its own, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed} {part}".encode()))
        return build()


class ConditionalPerceptron(nn.Module):
    """Two hidden layers, told a class beside their inputs.

    Args:
        in_features: F of the inputs (N, F).
        num_classes: of the class numbers (N,).
        hidden_size: width of both hidden layers.
        out_features: K of the outputs (N, K).
        last: further layers, such as an activation.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden_size: int,
        out_features: int,
        *last: nn.Module,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.layers = nn.Sequential(
            nn.Linear(in_features + num_classes, hidden_size),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden_size, hidden_size),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden_size, out_features),
            *last,
        )

    def forward(self, inputs: Tensor, classes: Tensor) -> Tensor:
        """Outputs (N, K) for inputs (N, F) of the parameters' dtype and class numbers (N,)."""
        told = functional.one_hot(classes, self.num_classes).to(inputs.dtype)
        outputs: Tensor = self.layers(torch.cat([inputs, told], dim=1))
        return outputs
