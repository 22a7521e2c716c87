import gzip
import pickle
import socket
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from simulation import data
from simulation.data import DatasetNotFoundError, TensorImages, collate_images, load_images
from torch.utils.data import ConcatDataset, DataLoader, Subset


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        assert 0 < socket.getdefaulttimeout() <= 30, "a download must not wait for ever"
        print("a chatty download")
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return TensorImages(images, torch.arange(10), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def _write_image(path, colour, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


# The data set in memory.


def test_access_normalises_per_channel(samples):
    image, label = samples[3]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (samples.mean, samples.std))
    assert image.dtype == torch.float32
    assert label == 3
    torch.testing.assert_close(image, (samples.images[3] / 255 - mean) / std)


def test_whole_batch_equals_stacked_samples(samples):
    indices = [7, 0, 3]
    batch = collate_images(samples.__getitems__(indices))
    stacked = collate_images([samples[index] for index in indices])
    for one, two in zip(batch, stacked, strict=True):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda samples: samples, id="bare"),
        pytest.param(lambda samples: Subset(samples, range(10)), id="subset"),
        pytest.param(lambda samples: ConcatDataset([samples]), id="sample by sample"),
    ],
)
def test_loader_yields_every_sample_once(samples, wrap):
    batches = list(DataLoader(wrap(samples), batch_size=4, collate_fn=collate_images))
    assert [len(images) for images, _ in batches] == [4, 4, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(10))
    torch.testing.assert_close(batches[0][0][1], samples[1][0])


def test_subset_keeps_order_and_preparation(samples):
    subset = samples.subset(np.array([4, 2]))
    assert len(subset) == 2
    assert subset.labels.tolist() == [4, 2]
    torch.testing.assert_close(subset[1][0], samples[2][0])


def test_augmentation_changes_training_access_alone(samples):
    torch.manual_seed(0)
    augmented = TensorImages(samples.images, samples.labels, samples.mean, samples.std, True)
    everything = list(range(10))
    first, second = (augmented.__getitems__(everything)[0] for _ in range(2))
    assert first.shape == second.shape == (10, 3, 8, 8)
    assert (first != second).flatten(1).any(1).sum() > 5
    plain = augmented.without_augmentation()
    torch.testing.assert_close(
        plain.__getitems__(everything)[0], samples.__getitems__(everything)[0]
    )
    assert plain.images.data_ptr() == samples.images.data_ptr()
    assert augmented.subset([1, 2]).augment


def test_augmentation_draws_for_each_sample():
    torch.manual_seed(0)
    same = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(20, 1, 8, 8)
    augmented = TensorImages(same, torch.zeros(20, dtype=torch.int64), (0.0,), (1.0,), True)
    images, _ = augmented.__getitems__(range(20))
    assert len(images.unique(dim=0)) > 10


def test_pickle(samples):
    copy = pickle.loads(pickle.dumps(samples))
    torch.testing.assert_close(copy[5][0], samples[5][0])


def test_wrong_tensors_are_refused(samples):
    images, labels, mean, std = samples.images, samples.labels, samples.mean, samples.std
    with pytest.raises(ValueError, match="images must be uint8"):
        TensorImages(images.float(), labels, mean, std)
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \(10,\)"):
        TensorImages(images, labels[:3], mean, std)
    with pytest.raises(ValueError, match="3 channels"):
        TensorImages(images, labels, mean[:1], std)


# The data sets by name.


def test_digits():
    digits = load_images("digits")
    assert (digits.name, digits.classes) == ("digits", 10)
    assert digits.train.images.shape == (1437, 3, 32, 32)
    assert digits.test.images.shape == (360, 3, 32, 32)
    assert not digits.train.augment
    share = torch.bincount(digits.test.labels) / torch.bincount(digits.train.labels)
    assert (share - 0.25).abs().max() < 0.02
    pixels, _ = digits.train.__getitems__(range(1437))
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.ones(3), rtol=0, atol=1e-3)
    assert torch.equal(digits.test.labels, load_images("digits").test.labels)


def test_auto_falls_back_to_digits_and_says_why(tmp_path, capsys):
    timeout = socket.getdefaulttimeout()
    fallback = load_images("auto", tmp_path)
    assert fallback.name == "digits"
    assert str(tmp_path / "cifar-10-batches-py") in fallback.note
    assert "no network in tests" in fallback.note
    assert socket.getdefaulttimeout() == timeout
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("fashionmnist", "FashionMNIST/raw"),
        ("svhn", "{train,test}_32x32.mat"),
        ("gtsrb", "gtsrb"),
    ],
)
def test_missing_data_set_names_the_places_and_the_remedy(name, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_DEBIAN_FASHIONMNIST", tmp_path / "debian")
    with pytest.raises(DatasetNotFoundError) as caught:
        load_images(name, tmp_path)
    message = str(caught.value)
    assert str(tmp_path / folder) in message
    assert "no network in tests" in message
    assert "put torchvision's files there" in message
    if name == "fashionmnist":
        assert str(tmp_path / "debian") in message
        assert "apt-get install dataset-fashion-mnist" in message


def test_unknown_data_set_names_the_choices(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'mnist'; choose one of auto, cifar10"):
        load_images("mnist", tmp_path)


def test_cifar10_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for batch, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        content = {"data": np.full((2, 3072), batch, np.uint8), "labels": [batch, 9]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))

    cifar10 = load_images("auto", tmp_path)
    assert (cifar10.name, cifar10.classes) == ("cifar10", 10)
    assert cifar10.train.images.shape == (10, 3, 32, 32)
    assert cifar10.train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert cifar10.test.labels.tolist() == [5, 9]
    assert cifar10.train.augment
    assert not cifar10.test.augment
    assert str(folder) in cifar10.note


def test_fashionmnist_from_the_debian_package(tmp_path, monkeypatch):
    debian = tmp_path / "debian"
    debian.mkdir()
    monkeypatch.setattr(data, "_DEBIAN_FASHIONMNIST", debian)
    for split, count in (("train", 3), ("t10k", 2)):
        pixels = np.arange(count, dtype=np.uint8).repeat(28 * 28).tobytes()
        labels = np.arange(count, dtype=np.uint8).tobytes()
        with gzip.open(debian / f"{split}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes(16) + pixels)
        with gzip.open(debian / f"{split}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(bytes(8) + labels)

    fashion = load_images("fashionmnist", tmp_path / "data")
    assert fashion.train.images.shape == (3, 1, 28, 28)
    assert fashion.train.images[:, 0, 5, 5].tolist() == fashion.train.labels.tolist() == [0, 1, 2]
    assert len(fashion.test) == 2
    assert not fashion.train.augment
    assert str(debian) in fashion.note


def test_gtsrb_is_resized(tmp_path):
    base = tmp_path / "gtsrb"
    for label in range(43):
        _write_image(base / f"GTSRB/Training/{label:05}/0.ppm", (label, 0, 0), size=(25, 40))
    _write_image(base / "GTSRB/Final_Test/Images/00000.ppm", (7, 0, 0), size=(50, 41))
    (base / "GT-final_test.csv").write_text("Filename;ClassId\n00000.ppm;7\n")

    signs = load_images("gtsrb", tmp_path)
    assert signs.classes == 43
    assert signs.train.images.shape == (43, 3, 32, 32)
    assert signs.train.images[:, 0, 9, 9].tolist() == signs.train.labels.tolist()
    assert signs.test.labels.tolist() == [7]


def test_svhn_without_scipy(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install scipy"):
        load_images("svhn", tmp_path)


def test_image_folder(tmp_path):
    _write_image(tmp_path / "train/cat/0.png", (255, 0, 51))
    _write_image(tmp_path / "train/dog/0.png", (0, 0, 51), size=(48, 40))
    _write_image(tmp_path / "test/cat/0.png", (255, 0, 51))
    _write_image(tmp_path / "test/dog/0.png", (0, 0, 51))

    folder = load_images("imagefolder", tmp_path)
    assert folder.classes == 2
    assert folder.train.images.shape == (2, 3, 32, 32)
    assert folder.train.labels.tolist() == [0, 1]
    assert folder.train.images[0, :, 0, 0].tolist() == [255, 0, 51]
    assert folder.train.mean == pytest.approx((0.5, 0.0, 0.2))
    assert folder.train.std == pytest.approx((0.5, 1 / 255, 1 / 255))
    assert folder.test.mean == folder.train.mean
    assert folder.train.augment
    assert not folder.test.augment


def test_image_folder_with_differing_classes(tmp_path):
    for path in ("train/cat/0.png", "train/dog/0.png", "test/cat/0.png", "test/cow/0.png"):
        _write_image(tmp_path / path, (0, 0, 0))
    with pytest.raises(ValueError, match="only one of them has cow, dog"):
        load_images("imagefolder", tmp_path)


def test_image_folder_missing(tmp_path):
    _write_image(tmp_path / "train/cat/0.png", (0, 0, 0))
    with pytest.raises(DatasetNotFoundError) as caught:
        load_images("imagefolder", tmp_path)
    assert str(tmp_path / "train") in str(caught.value)
    assert str(tmp_path / "test") in str(caught.value)
