"""The networks of the published experiments (arXiv 2403.12329), and others to try.

`PLAIN` ones are without biases and without normalisation layers, so that a network is a list of
weight matrices, which is what a Kronecker-factored Fisher describes. Every module of theirs that
holds a weight is called exactly once a forward, and no activation works in place. `NORMALISED` ones
are what people use: with BatchNorm, GroupNorm, or LayerNorm and attention.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

PLAIN = ("lenet", "cnn", "resnet8", "resnet18")
NORMALISED = ("resnet8_batchnorm", "resnet8_groupnorm", "torchvision_resnet18", "vit")
MODELS = (*PLAIN, *NORMALISED)


class _Convolutional(nn.Module):
    """Two 5x5 convolutions, each max-pooled by 2, and three linear layers.

    Args:
        channels: Channels of an image.
        image_size: Height and width of an image.
        classes: Number of classes.
        filters: Output channels of the two convolutions.
        hidden: Widths of the two hidden linear layers.

    Raises:
        ValueError: If nothing is left of an image of this size after the two convolutions.
    """

    def __init__(
        self,
        channels: int,
        image_size: int,
        classes: int,
        filters: tuple[int, int],
        hidden: tuple[int, int],
    ) -> None:
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2
        if side < 1:
            raise ValueError(f"image_size must be at least 16, not {image_size}")
        self.conv1 = nn.Conv2d(channels, filters[0], 5, bias=False)
        self.conv2 = nn.Conv2d(filters[0], filters[1], 5, bias=False)
        self.fc1 = nn.Linear(filters[1] * side**2, hidden[0], bias=False)
        self.fc2 = nn.Linear(hidden[0], hidden[1], bias=False)
        self.fc3 = nn.Linear(hidden[1], classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, channels, image_size, image_size)."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc3(F.relu(self.fc2(x)))
        return logits


class LeNet(_Convolutional):
    """LeNet-5 with ReLU and max-pooling: 44,190 weights for 1x28x28 images and 10 classes."""

    def __init__(self, channels: int = 1, image_size: int = 28, classes: int = 10) -> None:
        """Initialise the weights.

        Args:
            channels: Channels of an image.
            image_size: Height and width of an image, at least 16.
            classes: Number of classes.
        """
        super().__init__(channels, image_size, classes, filters=(6, 16), hidden=(120, 84))


class CNN(_Convolutional):
    """The published CNN: 939,616 weights for 3x32x32 images and 10 classes."""

    def __init__(self, channels: int = 3, image_size: int = 32, classes: int = 10) -> None:
        """Initialise the weights.

        Args:
            channels: Channels of an image.
            image_size: Height and width of an image, at least 16.
            classes: Number of classes.
        """
        super().__init__(channels, image_size, classes, filters=(32, 64), hidden=(512, 128))


_Norm: TypeAlias = Callable[[int], nn.Module]
"""Makes the layer that normalises a number of channels."""


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: _Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm(outputs)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        x, shortcut = F.relu(self.norm1(self.conv1(x))), self.shortcut(x)
        return F.relu(self.norm2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    """A residual network for small images: 3x3 stem, stages of basic blocks, mean pool, one linear.

    Each stage after the first halves the image.
    """

    def __init__(
        self,
        channels: int = 3,
        classes: int = 10,
        widths: Sequence[int] = (64, 128, 256, 512),
        blocks: Sequence[int] = (2, 2, 2, 2),
        grid: int = 1,
        scaled: bool = False,
        norm: _Norm = nn.Identity,
    ) -> None:
        """Initialise the weights.

        Args:
            channels: Channels of an image.
            classes: Number of classes.
            widths: Channels of each stage.
            blocks: Basic blocks in each stage.
            grid: Cells a side that the last feature map is averaged to.
            scaled: Initialise so that the signal keeps its size through the depth: He's normal
                distribution, with the last convolution of each of the L branches divided by
                sqrt(L), so that the L sums multiply the variance by less than e. Otherwise
                PyTorch's default, as published.
            norm: Makes the layer behind each 3x3 convolution, given its channels; none as
                published.
        """
        super().__init__()
        self.grid = grid
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.norm = norm(widths[0])
        self.blocks = nn.Sequential()
        inputs = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                self.blocks.append(_BasicBlock(inputs, width, stride, norm))
                inputs = width
        self.fc = nn.Linear(inputs * grid**2, classes, bias=False)
        if scaled:
            self._scale()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, channels, height, width)."""
        x = self.blocks(F.relu(self.norm(self.stem(images))))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, self.grid).flatten(1))
        return logits

    @torch.no_grad()
    def _scale(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if name.endswith("shortcut"):
                    module.weight /= math.sqrt(2)  # No rectifier halves what a shortcut passes.
                if name.endswith("conv2"):
                    module.weight /= math.sqrt(len(self.blocks))


def _resnet8(channels: int, classes: int, norm: _Norm = nn.Identity) -> ResNet:
    """Builds three stages of one block, with normalisation or without."""
    # The last map is 8x8 (published: 4x4), so the published pooling by 4 leaves 2x2 cells.
    return ResNet(channels, classes, (16, 32, 64), (1, 1, 1), grid=2, scaled=True, norm=norm)


def _torchvision_resnet18(channels: int, classes: int) -> nn.Module:
    """Builds torchvision's ResNet18 for any number of channels."""
    network = models.resnet18(num_classes=classes)
    network.conv1 = nn.Conv2d(channels, 64, 7, 2, padding=3, bias=False)
    return network


def _vit(channels: int, image_size: int, classes: int) -> nn.Module:
    """Builds a small vision transformer of torchvision for any number of channels."""
    if image_size % 4:
        raise ValueError(f"image_size must be a multiple of 4 for 4x4 patches, not {image_size}")
    patch = image_size // 4
    network = models.VisionTransformer(image_size, patch, 4, 4, 64, 128, num_classes=classes)
    network.conv_proj = nn.Conv2d(channels, 64, patch, patch)
    return network


def build_model(name: str, channels: int, image_size: int, classes: int) -> nn.Module:
    """Build one of the networks in `MODELS`, freshly initialised.

    Args:
        name: ``lenet``, ``cnn``, ``resnet18`` (published), ``resnet8`` (three stages of one block,
            widths 16-32-64, initialised to train within a few epochs), ``resnet8_batchnorm`` and
            ``resnet8_groupnorm`` (with groups of eight channels), ``torchvision_resnet18`` (with
            BatchNorm), or ``vit`` (torchvision's, with sixteen patches and four layers of width
            64), both with a first convolution for any number of channels.
        channels: Channels of an image.
        image_size: Height and width of an image; the residual networks take any.
        classes: Number of classes.

    Returns:
        The network, which maps images (N, channels, image_size, image_size) to logits
        (N, classes).

    Raises:
        ValueError: If the name is unknown, or the image too small for the network, or not to be cut
            into patches.
    """
    match name:
        case "lenet":
            return LeNet(channels, image_size, classes)
        case "cnn":
            return CNN(channels, image_size, classes)
        case "resnet8":
            return _resnet8(channels, classes)
        case "resnet8_batchnorm":
            return _resnet8(channels, classes, norm=nn.BatchNorm2d)
        case "resnet8_groupnorm":
            return _resnet8(channels, classes, norm=lambda width: nn.GroupNorm(width // 8, width))
        case "resnet18":
            return ResNet(channels, classes)
        case "torchvision_resnet18":
            return _torchvision_resnet18(channels, classes)
        case "vit":
            return _vit(channels, image_size, classes)
        case _:
            raise ValueError(f"unknown model {name!r}; choose one of {', '.join(MODELS)}")
