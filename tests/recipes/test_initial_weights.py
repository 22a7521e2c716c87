"""Weights to start from: what is taken from a file, and what is refused."""

import pytest
import torch
from safetensors.torch import save_file
from simulation.initial_weights import read_initial_weights, weights_digest, without_prefix
from simulation.models import build_model


@pytest.fixture
def network():
    torch.manual_seed(0)
    return build_model("lenet", 3, 32, 10)


@pytest.fixture
def state():
    torch.manual_seed(1)
    return build_model("lenet", 3, 32, 10).state_dict()


def read(path, state, network, **options):
    save_file(state, path / "start.safetensors")
    return read_initial_weights(path / "start.safetensors", network, **options)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("prefix", ["", "network."])
def test_names_of_the_network_and_of_the_classifier_are_taken(prefix, state, network, tmp_path):
    start = read(tmp_path, {prefix + name: t for name, t in state.items()}, network)
    assert equal(start, state)
    network.load_state_dict(start)


def test_every_misfit_is_named(state, network, tmp_path):
    state["other.weight"] = torch.zeros(2)
    state["fc1.weight"] = torch.zeros(3, 400)
    state["fc2.weight"] = state["fc2.weight"].half()
    state["fc3.weight"][0, 0] = float("nan")
    del state["conv1.weight"]
    with pytest.raises(ValueError, match=r"does not fit .* same --model") as caught:
        read(tmp_path, state, network)
    for problem in (
        "conv1.weight is missing",
        "other.weight is unknown",
        "fc1.weight is of shape (3, 400), not (120, 400)",
        "fc2.weight is torch.float16, not torch.float32",
        "fc3.weight is not finite",
    ):
        assert problem in str(caught.value)
    assert "conv2" not in str(caught.value)


@pytest.mark.parametrize("head", [{}, {"fc3.weight": (43, 84), "fc3.bias": (43,)}])
def test_the_head_of_other_classes_is_left_out_only_if_asked(head, state, network, tmp_path):
    del state["fc3.weight"]
    given = state | {name: torch.ones(shape) for name, shape in head.items()}
    with pytest.raises(ValueError, match="add --new-head"):
        read(tmp_path, given, network)
    start = read(tmp_path, given, network, new_head=True)
    assert equal(start, state | {"fc3.weight": network.fc3.weight.detach()})


def test_what_is_no_safetensors_file_is_refused_and_not_unpickled(state, network, tmp_path):
    class Harmful:
        def __reduce__(self):
            return (tmp_path / "harm").touch, ()

    path = tmp_path / "start.pt"
    torch.save({"state_dict": state, "more": Harmful()}, path)
    with pytest.raises(ValueError, match="pickled checkpoints are not opened"):
        read_initial_weights(path, network)
    assert not (tmp_path / "harm").exists()
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        read_initial_weights(path, network)
    for missing in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="is no file"):
            read_initial_weights(missing, network)


def test_the_digest_tells_names_and_values_apart_and_no_order(state):
    found = weights_digest(state)
    assert found == weights_digest(dict(reversed(state.items())))
    assert found == weights_digest(without_prefix({"network." + n: t for n, t in state.items()}))
    changed = state | {"fc3.weight": state["fc3.weight"] + 1}
    renamed = {name.replace("fc3", "fc4"): tensor for name, tensor in state.items()}
    assert len({found, weights_digest(changed), weights_digest(renamed)}) == 3
