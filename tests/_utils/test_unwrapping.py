"""Modules without what wraps them."""

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_fedfisher._utils.unwrapping import unwrapped

X = torch.randn(3, 4)


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def test_a_module_without_wrappers_is_itself():
    model = _net()
    assert unwrapped(model) is model


def test_names_are_those_of_the_module_as_it_was_written():
    names = list(_net().state_dict())
    for wrap in (
        lambda m: torch.compile(m, backend="eager"),
        checkpoint_wrapper,
        nn.DataParallel,
        lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
    ):
        plain, whole = _net(), wrap(_net())
        assert list(unwrapped(whole).state_dict()) == names
        inner = nn.ModuleDict({"net": wrap(plain), "same": plain})
        found = unwrapped(inner)
        assert [n for n, _ in found.named_parameters()] == [
            f"net.{n}" for n, _ in plain.named_parameters()
        ]
        assert found["net"] is found["same"] is plain
        assert list(inner)  # and the module itself is as it was
        assert type(inner["net"]) is not nn.Sequential


def test_what_is_unwrapped_shares_its_values_and_runs():
    inner = _net()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(inner, backend="eager")
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * self.net(x)

    outer = Outer().eval()
    found = unwrapped(outer)
    assert torch.equal(found(X), outer(X))
    with torch.no_grad():
        found.scale.fill_(2.0)
    assert outer.scale == 2.0
    assert torch.equal(found(X), outer(X))


def test_methods_set_on_an_instance_belong_to_what_is_unwrapped():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(nn.Linear(4, 3), backend="eager")
            self.forward = self.other

        def other(self, x):
            return self.net(x), type(self.net)

    assert Outer()(X)[1] is not nn.Linear
    assert unwrapped(Outer())(X)[1] is nn.Linear


def test_parameters_take_the_place_of_others_wherever_these_are():
    model = nn.ModuleDict({"net": torch.compile(nn.Linear(2, 1), backend="eager")})
    model["tied"] = nn.ParameterList([model["net"].weight])
    replaced = nn.Parameter(torch.zeros(1, 2))
    found = unwrapped(model, {id(model["net"].weight): replaced})
    assert found.get_parameter("net.weight") is found.get_parameter("tied.0") is replaced
    assert found.get_parameter("net.bias") is model["net"].bias
    assert model["net"].weight is not replaced
