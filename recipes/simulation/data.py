"""Image data sets held in memory, so that a batch is one indexing and clients are cheap to make.

Augmentation follows the published experiments (arXiv 2403.12329): random crops and horizontal flips
on CIFAR-10, CIFAR-100, GTSRB and image folders (CINIC-10), none on FashionMNIST and SVHN.
"""

import contextlib
import dataclasses
import gzip
import http.client
import importlib.util
import io
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms
from tqdm import trange

ImagesAndLabels: TypeAlias = tuple[Tensor, Tensor]

_SIDE = 32
_DEBIAN_FASHIONMNIST = Path("/usr/share/datasets/fashion-mnist")
_DOWNLOAD_TIMEOUT_SECONDS = 10.0


class DatasetNotFoundError(FileNotFoundError):
    """A data set is in none of the places looked at; the message names them and the remedy."""


@dataclass(frozen=True, eq=False)
class TensorImages(Dataset[ImagesAndLabels]):
    """Labelled images in memory, normalised (and augmented, if asked) on access.

    It hands a `torch.utils.data.DataLoader` whole batches; give that loader `collate_images`.

    Attributes:
        images: Pixels, uint8 of shape (N, C, H, W).
        labels: Classes, int64 of shape (N,).
        mean: Mean of each channel, of pixels scaled to [0, 1].
        std: Standard deviation of each channel, of pixels scaled to [0, 1].
        augment: Whether each access crops a sample at random (padded by 4) and mirrors every other.

    Raises:
        ValueError: If a shape or a type is not as stated.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool = False

    def __post_init__(self) -> None:
        """Check shapes and types."""
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise ValueError(
                "images must be uint8 of shape (N, C, H, W), "
                f"not {self.images.dtype} of {tuple(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be int64 of shape ({len(self.images)},), "
                f"not {self.labels.dtype} of {tuple(self.labels.shape)}"
            )
        if not len(self.mean) == len(self.std) == self.images.shape[1]:
            raise ValueError(f"mean and std must each hold {self.images.shape[1]} channels")

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.images)

    def __getitem__(self, index: int) -> ImagesAndLabels:
        """Return one image, float32 of shape (C, H, W), and its label, a scalar int64."""
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> ImagesAndLabels:
        """Return a batch: images, float32 of shape (B, C, H, W), and labels, int64 of (B,)."""
        chosen = torch.as_tensor(indices)
        images = self.images[chosen]
        if self.augment:
            # One call per sample: on a batch the transform would draw one crop for all.
            crop_and_flip = v2.Compose(
                [v2.RandomCrop(tuple(images.shape[-2:]), padding=4), v2.RandomHorizontalFlip()]
            )
            images = torch.stack([crop_and_flip(image) for image in images])
        pixels = transforms.to_dtype(images, torch.float32, scale=True)
        return transforms.normalize(pixels, list(self.mean), list(self.std)), self.labels[chosen]

    def subset(self, indices: np.ndarray | Tensor | Sequence[int]) -> "TensorImages":
        """Return these samples alone, copied, in this order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return dataclasses.replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def without_augmentation(self) -> "TensorImages":
        """Return the same samples, sharing their memory, never augmented."""
        return dataclasses.replace(self, augment=False)


@dataclass(frozen=True)
class ImageData:
    """A data set ready for training.

    Attributes:
        name: Name of the data set in hand, which ``auto`` does not tell.
        train: Training samples, augmented where the published experiments do.
        test: Test samples, not augmented.
        classes: Number of classes.
        note: One sentence on which data this is, where it comes from, and why.
    """

    name: str
    train: TensorImages
    test: TensorImages
    classes: int
    note: str


def collate_images(batch: ImagesAndLabels | list[ImagesAndLabels]) -> ImagesAndLabels:
    """Pass on a ready batch of `TensorImages`, or stack a list of samples into one."""
    if isinstance(batch, tuple):
        return batch
    images, labels = default_collate(batch)
    return images, labels


def load_images(dataset: str, data_dir: Path | None = None) -> ImageData:
    """Load a data set into memory.

    Args:
        dataset: One of `DATASETS`. ``auto`` is CIFAR-10 where it is on disk or can be downloaded,
            and otherwise the digits embedded in scikit-learn, of which ``note`` tells.
            ``imagefolder`` reads a folder per class in the data folder's ``train`` and ``test``.
        data_dir: Folder with the data, in torchvision's layout, and for downloads; ``data`` if not
            given.

    Returns:
        The data: FashionMNIST in 1x28x28, all others in 3x32x32.

    Raises:
        DatasetNotFoundError: If a data set asked for by name is neither on disk nor downloadable.
        ModuleNotFoundError: If SVHN is asked for without SciPy, which reads its files.
        ValueError: If the name is unknown, or train and test folders hold different classes.
    """
    data_dir = Path("data") if data_dir is None else data_dir
    match dataset:
        case "auto":
            try:
                return _load_published("cifar10", data_dir)
            except DatasetNotFoundError as error:
                note = f"embedded scikit-learn digits, because {error}"
                return dataclasses.replace(_load_digits(), note=note)
        case "imagefolder":
            return _load_image_folder(data_dir)
        case "digits":
            return _load_digits()
        case _ if dataset in _PUBLISHED:
            return _load_published(dataset, data_dir)
        case _:
            raise ValueError(f"unknown data set {dataset!r}; choose one of {', '.join(DATASETS)}")


def _svhn(root: Path, train: bool, download: bool) -> datasets.VisionDataset:
    if importlib.util.find_spec("scipy") is None:
        raise ModuleNotFoundError("SVHN needs SciPy to read its files: pip install scipy")
    split = "train" if train else "test"
    return datasets.SVHN(root, split, transform=v2.PILToTensor(), download=download)


def _gtsrb(root: Path, train: bool, download: bool) -> datasets.VisionDataset:
    split = "train" if train else "test"
    return datasets.GTSRB(root, split, transform=_resized_to_tensor(), download=download)


def _resized_to_tensor() -> v2.Compose:
    return v2.Compose([v2.Resize((_SIDE, _SIDE)), v2.PILToTensor()])


@dataclass(frozen=True)
class _Published:
    """A published data set: how torchvision keeps it, and how it is prepared."""

    title: str
    folder: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool
    open: Callable[[Path, bool, bool], datasets.VisionDataset]  # (root, train, download)

    def read(self, root: Path, download: bool) -> tuple[ImagesAndLabels, ImagesAndLabels]:
        train, test = self.open(root, True, download), self.open(root, False, download)
        return _decode(train, self.title), _decode(test, self.title)


_PUBLISHED = {
    "cifar10": _Published(
        title="CIFAR-10",
        folder="cifar-10-batches-py",
        classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        augment=True,
        open=lambda root, train, download: datasets.CIFAR10(
            root, train, v2.PILToTensor(), download=download
        ),
    ),
    "cifar100": _Published(
        title="CIFAR-100",
        folder="cifar-100-python",
        classes=100,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        augment=True,
        open=lambda root, train, download: datasets.CIFAR100(
            root, train, v2.PILToTensor(), download=download
        ),
    ),
    "fashionmnist": _Published(
        title="FashionMNIST",
        folder="FashionMNIST/raw",
        classes=10,
        mean=(0.2860,),
        std=(0.3530,),
        augment=False,
        open=lambda root, train, download: datasets.FashionMNIST(
            root, train, v2.PILToTensor(), download=download
        ),
    ),
    "svhn": _Published(
        title="SVHN",
        folder="{train,test}_32x32.mat",
        classes=10,
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        augment=False,
        open=_svhn,
    ),
    "gtsrb": _Published(
        title="GTSRB",
        folder="gtsrb",
        classes=43,
        mean=(0.3403, 0.3121, 0.3214),
        std=(0.2724, 0.2608, 0.2669),
        augment=True,
        open=_gtsrb,
    ),
}

DATASETS = ("auto", *_PUBLISHED, "imagefolder", "digits")


def _load_published(name: str, data_dir: Path) -> ImageData:
    published = _PUBLISHED[name]
    places = [data_dir / published.folder]
    remedy = "put torchvision's files there, or run once with a network connection"

    def result(train: ImagesAndLabels, test: ImagesAndLabels, source: str) -> ImageData:
        return ImageData(
            name=name,
            train=TensorImages(*train, published.mean, published.std, published.augment),
            test=TensorImages(*test, published.mean, published.std),
            classes=published.classes,
            note=f"{published.title} {source}",
        )

    with contextlib.suppress(RuntimeError, FileNotFoundError):
        return result(*published.read(data_dir, download=False), f"read from {places[0]}")
    if name == "fashionmnist":
        places.append(_DEBIAN_FASHIONMNIST)
        remedy = "apt-get install dataset-fashion-mnist, " + remedy
        with contextlib.suppress(FileNotFoundError):
            return result(*_read_debian_fashionmnist(), f"read from {places[1]}")
    try:
        with _hasty_quiet_download():
            splits = published.read(data_dir, download=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())
        raise DatasetNotFoundError(
            f"{published.title} was neither found in {' or '.join(map(str, places))} "
            f"nor downloadable ({reason}); {remedy}"
        ) from error
    return result(*splits, f"downloaded to {data_dir}")


def _load_image_folder(data_dir: Path) -> ImageData:
    folders = [data_dir / "train", data_dir / "test"]
    try:
        train, test = (datasets.ImageFolder(folder, _resized_to_tensor()) for folder in folders)
    except FileNotFoundError as error:
        raise DatasetNotFoundError(
            f"no images in a folder per class were found in both {folders[0]} and {folders[1]} "
            f"({error}); put them there, or name another data folder"
        ) from error
    if differing := sorted(set(train.classes) ^ set(test.classes)):
        raise ValueError(
            f"{folders[0]} and {folders[1]} must hold the same classes; "
            f"only one of them has {', '.join(differing)}"
        )
    images, labels = _decode(train, "training images")
    mean, std = _channel_statistics(images)
    return ImageData(
        name="imagefolder",
        train=TensorImages(images, labels, mean, std, augment=True),
        test=TensorImages(*_decode(test, "test images"), mean, std),
        classes=len(train.classes),
        note=f"images read from {folders[0]} and {folders[1]}",
    )


def _load_digits() -> ImageData:
    digits = load_digits()
    pixels = torch.from_numpy(digits.images).unsqueeze(1) * (255 / 16)  # 17 grey levels, 8x8
    images = transforms.resize(pixels, [_SIDE, _SIDE]).round().to(torch.uint8).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(digits.target)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    mean, std = _channel_statistics(images[train])
    everything = TensorImages(images, labels, mean, std)
    return ImageData(
        name="digits",
        train=everything.subset(train),
        test=everything.subset(test),
        classes=10,
        note="embedded scikit-learn digits, as asked",
    )


def _read_debian_fashionmnist() -> tuple[ImagesAndLabels, ImagesAndLabels]:
    def read(split: str) -> ImagesAndLabels:
        # The headers: a magic number and one size per dimension, 4 bytes each.
        with gzip.open(_DEBIAN_FASHIONMNIST / f"{split}-images-idx3-ubyte.gz") as file:
            images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
        with gzip.open(_DEBIAN_FASHIONMNIST / f"{split}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
        return torch.tensor(images), torch.tensor(labels, dtype=torch.int64)

    return read("train"), read("t10k")


def _decode(dataset: datasets.VisionDataset, title: str) -> ImagesAndLabels:
    samples = [
        dataset[i]
        for i in trange(
            len(dataset), desc=f"decoding {title}", delay=2, mininterval=1, disable=None
        )
    ]
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64)


def _channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return each channel's mean and standard deviation, from its histogram: exact, no copy."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        shares = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = float(shares @ values)
        variance = float(shares @ (values - mean) ** 2)
        means.append(mean)
        stds.append(max(variance**0.5, 1 / 255))  # A channel of one colour must not divide by 0.
    return tuple(means), tuple(stds)


@contextlib.contextmanager
def _hasty_quiet_download() -> Iterator[None]:
    """Give up on a silent server soon; show torchvision's progress bar in a terminal only."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_SECONDS)
    bar = sys.stderr if sys.stderr.isatty() else io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(bar):
            yield
    finally:
        socket.setdefaulttimeout(timeout)
