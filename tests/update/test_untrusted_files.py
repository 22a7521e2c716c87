"""Properties of whatever a stranger can send: refused, or an update like any other."""

import random
import struct

import numpy as np
import pytest
import torch
from fuzzing.mutations import MUTATIONS, UpdateParts
from helpers.federation import NormedClassifier, tiny_updates
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lightning_fedfisher import ClientUpdate, UpdateError
from lightning_fedfisher.update.integer_coding import LARGEST, decode, encode

settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("tests")

KINDS = ("kfac", "ekfac", "diagonal", "identity")
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.text(max_size=8)
    | st.sampled_from(["float16", "kronecker", "network.0", "parameters/network.0.weight"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A file of each kind, as it is and packed."""
    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_fedfisher.update.upload_budget._SMALLEST_BUDGET", 0)
        patch.setattr("helpers.federation.TinyClassifier", NormedClassifier)
        found = []
        for kind in KINDS:
            (update,) = tiny_updates(folder / kind, 1, 1, curvature=kind, upload_budget=None)
            found.append(update.save(folder / f"{kind}.safetensors").read_bytes())
            found.append(
                update.compressed(12).save(folder / f"{kind}-packed.safetensors").read_bytes()
            )
    return found


@pytest.fixture
def path(tmp_path):
    return tmp_path / "mutant.safetensors"


def _read(path, data):
    """What is accepted is an update: all of it is read, finite and of the shapes it says."""
    path.write_bytes(data)
    try:
        update = ClientUpdate.open(path)
        update.verify()
        tensors = {}
        for layer in update.layers:
            block = update.block(layer)
            tensors |= {f"{layer.name}/{part}": tensor for part, tensor in block.tensors().items()}
            tensors[layer.name] = update.weights(layer)
            assert tensors[layer.name].shape == block.shape == layer.shape
        for name, (shape, dtype) in update.specs.items():
            tensor = (update.parameters | update.buffers)[name]
            assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
        tensors |= update.buffers
    except UpdateError as error:
        refusal = error
    else:
        refusal = None
    if refusal:
        assert str(path) in str(refusal)
        assert refusal.offenders
        return None
    for name, tensor in tensors.items():
        assert not tensor.is_floating_point() or torch.isfinite(tensor).all(), name
    assert 1 <= update.num_samples <= 2**40
    return tensors


def test_sound_files_are_accepted(sound, path):
    assert all(_read(path, data) for data in sound)


@given(data=st.binary(max_size=200))
def test_any_bytes_are_refused(data, path):
    assert _read(path, data) is None


@given(text=st.text(max_size=50), tail=st.binary(max_size=20))
def test_any_header_is_refused(text, tail, path):
    header = text.encode("utf-8", "replace")
    assert _read(path, struct.pack("<Q", len(header)) + header + tail) is None


@given(index=st.integers(0, 7), place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_any_byte_changed_is_refused(index, place, byte, sound, path):
    data = bytearray(sound[index])
    where = int(place * len(data))
    same = data[where] == byte
    data[where] = byte
    assert (_read(path, bytes(data)) is not None) == same


@given(index=st.integers(0, 7), kind=st.sampled_from(list(MUTATIONS)), seed=st.integers(0, 2**32))
def test_any_mutation_is_refused_or_an_update(index, kind, seed, sound, path):
    dice = random.Random(seed)
    _read(path, MUTATIONS[kind](sound[index], dice.choice(sound), dice))


@given(data=st.data(), index=st.integers(0, 7), value=JSON)
def test_any_value_in_the_header_is_refused_or_an_update(data, index, value, sound, path):
    parts = UpdateParts.read(sound[index])
    place = parts.fields
    while True:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(list(keys)))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            place[key] = value
            break
        place = inner
    _read(path, parts.signed())


@given(
    index=st.integers(0, 7),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
)
def test_any_content_is_refused_or_an_update(index, changes, sound, path):
    parts = UpdateParts.read(sound[index])
    for place, byte in changes:
        parts.content[int(place * len(parts.content))] = byte
    _read(path, parts.signed())


INTEGERS = st.integers(-LARGEST, LARGEST) | st.integers(-3, 3)


@given(numbers=arrays.arrays(np.int32, st.integers(0, 300), elements=INTEGERS))
def test_packing_is_undone_by_unpacking(numbers):
    tensor = torch.from_numpy(numbers)
    payload = encode(tensor)
    assert torch.equal(decode(payload, len(tensor)), tensor)
    assert torch.equal(encode(tensor), payload)
    for count in {0, 1, len(tensor) - 1, len(tensor) + 1, 10**12} - {len(tensor), -1}:
        with pytest.raises(ValueError, match="packed bytes"):
            decode(payload, count)


@given(data=st.binary(max_size=100), count=st.integers(0, 2**60))
def test_any_payload_is_refused_or_as_many_numbers(data, count):
    try:
        numbers = decode(torch.tensor(list(data), dtype=torch.uint8), count)
    except ValueError:
        return
    assert len(numbers) == count
    assert int(numbers.abs().max()) <= LARGEST if count else True
