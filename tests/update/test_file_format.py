"""Reading an update: one header, one opening, and a hash with each read."""

import copy
import hashlib
import mmap
import os
import pickle
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_fedfisher
from lightning_fedfisher import ClientUpdate, UpdateError
from lightning_fedfisher.curvature import Diagonal
from lightning_fedfisher.layers import find_layers
from lightning_fedfisher.update import UpdateHeader, file_format
from lightning_fedfisher.update.file_format import digest


def _update(seed=0, layers=4, width=3):
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)), nn.BatchNorm1d(width))
    found = find_layers(model)
    blocks = {layer.name: Diagonal(torch.rand(layer.shape)) for layer in found}
    kinds = dict.fromkeys(blocks, "diagonal")
    header = UpdateHeader(7, "diagonal", "exact", "categorical", 7, found, kinds)
    return ClientUpdate.from_model(model, header, blocks)


@pytest.fixture
def path(tmp_path):
    return _update().save(tmp_path / "client.safetensors")


@dataclass
class _Counts:
    """What was done to files, by path or position."""

    opened: Counter = field(default_factory=Counter)
    parsed: Counter = field(default_factory=Counter)
    read: Counter = field(default_factory=Counter)
    hashed: int = 0

    def clear(self):
        self.opened.clear(), self.parsed.clear(), self.read.clear()
        self.hashed = 0


@pytest.fixture
def counts(monkeypatch):
    counts, open_regular = _Counts(), file_format.open_regular
    read_layout, read_bytes = file_format.read_layout, file_format.read_bytes

    def opening(path):
        counts.opened[path.name] += 1
        return open_regular(path)

    def parsing(file):
        counts.parsed[Path(file.name).name] += 1
        return read_layout(file)

    def reading(file, start, size):
        counts.read[Path(file.name).name, start] += 1
        return read_bytes(file, start, size)

    def hashing(tensor):
        counts.hashed += 1
        return digest(tensor)

    monkeypatch.setattr(file_format, "open_regular", opening)
    monkeypatch.setattr(file_format, "read_layout", parsing)
    monkeypatch.setattr(file_format, "read_bytes", reading)
    monkeypatch.setattr(file_format, "digest", hashing)
    return counts


def _read_layer(update, layer):
    """A layer's weights and curvature, in one opening."""
    with update.opened():
        return update.weights(layer), update.block(layer)


def test_each_phase_opens_a_file_once_and_reads_each_tensor_once(counts, tmp_path):
    names = [f"{seed}.safetensors" for seed in range(3)]
    paths = [_update(seed).save(tmp_path / name) for seed, name in enumerate(names)]
    counts.clear()
    updates = [ClientUpdate.open(path) for path in paths]
    assert counts.opened == counts.parsed == Counter(names)
    assert not counts.read
    assert counts.hashed == 0
    counts.clear()

    for update in updates:
        update.verify()
    tensors = sum(len(update.digests) for update in updates)
    assert counts.opened == Counter(names)
    assert set(counts.read.values()) == {1}
    assert len(counts.read) == counts.hashed == tensors
    counts.clear()

    for update in updates:  # as a merge does
        with update.opened():
            for layer in update.layers:
                _read_layer(update, layer)
            assert len(update.buffers) == 3
    assert counts.opened == Counter(names)
    assert set(counts.read.values()) == {1}
    assert len(counts.read) == counts.hashed == tensors
    assert not counts.parsed


def test_what_is_read_is_what_was_written(path):
    update, opened = _update(), ClientUpdate.open(path)
    for layer in update.layers:
        weights, curvature = _read_layer(opened, layer)
        assert torch.equal(weights, update.weights(layer))
        assert torch.equal(curvature.values, update.block(layer).values)


def test_the_header_is_parsed_once_however_many_layers_there_are(counts, tmp_path):
    update = ClientUpdate.open(_update(layers=300).save(tmp_path / "deep.safetensors"))
    counts.clear()
    update.verify()
    for layer in update.layers:
        update.weights(layer), update.block(layer)
    assert not counts.parsed
    assert Counter(counts.read.values()) == {2: 3 * 301, 1: 3}
    assert counts.hashed == sum(counts.read.values())


def test_openings_may_be_nested_and_end_with_the_outermost(counts, path):
    update = ClientUpdate.open(path)
    counts.clear()
    with update.opened():
        with update.opened(), update.opened():
            update.weights(update.layers[0])
        update.weights(update.layers[1])
        with pytest.raises(ZeroDivisionError), update.opened():
            _ = 1 / 0
        assert update.parameters
    assert sum(counts.opened.values()) == 1
    update.weights(update.layers[0])
    assert sum(counts.opened.values()) == 3  # weight and bias
    with _update().opened() as nothing:  # in memory
        assert nothing is None


# Files that change after they were verified


def _place(path, tensor):
    return path.read_bytes().index(tensor.numpy().tobytes())


def test_a_byte_changed_in_place_is_noticed(path):
    update = ClientUpdate.open(path)
    update.verify()
    weight = update.parameters["2.weight"]
    with path.open("r+b") as file:
        file.seek(_place(path, weight))
        file.write(b"\xff")
    assert torch.equal(update.weights(update.layers[1]), _update().weights(update.layers[1]))
    with pytest.raises(UpdateError, match=r"2\.weight does not match its digest") as error:
        update.weights(update.layers[2])
    assert error.value.source == str(path)


def test_a_byte_changed_in_place_while_the_file_is_open_is_noticed(path):
    update = ClientUpdate.open(path)
    update.verify()
    place = _place(path, update.parameters["2.weight"])
    with update.opened():
        _read_layer(update, update.layers[2])
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"\xff")
        with pytest.raises(UpdateError, match=r"2\.weight does not match its digest"):
            _read_layer(update, update.layers[2])


def test_a_change_through_a_map_is_noticed_though_no_time_tells_of_it(path):
    update = ClientUpdate.open(path)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        place = _place(path, _update().parameters["2.weight"])
        mapped[place] = mapped[place]  # from here on the page may be written to
        update.verify()
        mapped[place] ^= 0xFF
        with pytest.raises(UpdateError, match=r"2\.weight does not match its digest"):
            update.weights(update.layers[2])


def test_another_file_in_its_place_is_noticed(path):
    update = ClientUpdate.open(path)
    update.verify()
    os.replace(_update(seed=1).save(path.with_suffix(".other")), path)
    with pytest.raises(UpdateError, match=r"0\.weight does not match its digest"):
        update.weights(update.layers[0])
    with pytest.raises(UpdateError) as error:
        update.verify()
    assert sum("does not match its digest" in line for line in error.value.offenders) > 10


def test_what_was_opened_stays_whole_when_the_file_is_replaced_or_deleted(path):
    update = ClientUpdate.open(path)
    with update.opened():
        os.replace(_update(seed=1).save(path.with_suffix(".other")), path)
        update.verify()
        path.unlink()
        update.verify()
        assert torch.equal(update.parameters["0.weight"], _update().parameters["0.weight"])


@pytest.mark.parametrize("inside", [True, False])
def test_a_file_that_is_cut_off_is_refused_by_tensor(inside, path):
    update = ClientUpdate.open(path)
    update.verify()
    size = path.stat().st_size
    if inside:
        with update.opened():
            os.truncate(path, size // 2)
            with pytest.raises(UpdateError) as error:
                update.verify()
    else:
        os.truncate(path, size // 2)
        with pytest.raises(UpdateError) as error:
            update.verify()
    lines = error.value.offenders
    assert str(path) in str(error.value)
    assert any(line.endswith("cannot be read: the file is cut off") for line in lines)
    assert all(line.split()[0] in update.digests for line in lines)


# Many files, processes and threads


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_an_open_update_holds_no_file(path):
    before = len(os.listdir("/proc/self/fd"))
    updates = [ClientUpdate.open(path) for _ in range(1000)]
    for update in updates:
        _read_layer(update, update.layers[0])
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_open_update_is_copied_and_pickled_without_its_file(counts, path):
    update = ClientUpdate.open(path)
    with update.opened():
        update.verify()
        copies = [copy.deepcopy(update), copy.copy(update), pickle.loads(pickle.dumps(update))]
    for one in (copies[0], copies[2]):
        counts.clear()
        one.verify()
        assert counts.opened[path.name] == 1
        assert counts.hashed == len(update.digests)
    assert all(one.digest == update.digest for one in copies)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_reads_what_its_parent_has_open(path):
    update = ClientUpdate.open(path)
    with update.opened():
        update.verify()
        expected = update.parameters["1.weight"]
        child = os.fork()
        if not child:
            same = all(torch.equal(update.parameters["1.weight"], expected) for _ in range(200))
            os._exit(0 if same else 1)
        for _ in range(200):
            assert torch.equal(update.parameters["1.weight"], expected)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(update.parameters["1.weight"], expected)


def test_threads_read_one_update(path):
    update, expected = ClientUpdate.open(path), _update()

    def read(index):
        layer = update.layers[index % len(update.layers)]
        with update.opened():
            return torch.equal(_read_layer(update, layer)[0], expected.weights(layer))

    with update.opened(), ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(400)))


# Digests, and what else the room is made of


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float64], ids=str)
def test_a_digest_tells_type_shape_and_bytes(dtype):
    tensor = torch.tensor([[1, 0], [1, 1], [0, 1]], dtype=dtype)
    data = tensor.view(torch.uint8).numpy().tobytes()
    assert digest(tensor) == hashlib.sha256(f"{dtype} (3, 2)".encode() + data).hexdigest()
    assert digest(tensor.mT.contiguous().mT) == digest(tensor)
    assert len(
        {digest(tensor), digest(tensor.mT), digest(tensor.flatten()), digest(~tensor.bool())}
    )
    assert digest(tensor[:0]) != digest(tensor[:, :0])


def test_the_room_is_quick_to_enter():
    """Without Lightning and the like: `fedfisher inspect` reads one header."""
    (folder,) = lightning_fedfisher.__path__
    script = f"""
import sys, types
package = types.ModuleType("lightning_fedfisher")
package.__path__ = [{folder!r}]  # its own __init__ is another matter
sys.modules[package.__name__] = package
import lightning_fedfisher.update
heavy = {{"lightning", "pytorch_lightning", "torchvision", "pydantic", "torchmetrics", "wandb"}}
names = ("extraction", "merge", "callback", "tracking")
rooms = {{f"lightning_fedfisher.{{name}}" for name in names}}
print(sorted((heavy | rooms) & sys.modules.keys()))
"""
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
