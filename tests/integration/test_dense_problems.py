"""Every merged layer minimises its problem as written out in full, by formulas of its own."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from helpers.federation import TinyClassifier, quiet_trainer
from helpers.merging import merge, updates_by_curvature, with_header
from oracles import merge as oracle
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher import METHODS, FedFisherCallback
from lightning_fedfisher.layers import Source
from lightning_fedfisher.merge.solvers import ConjugateGradient

PRECISE = dataclasses.replace(
    METHODS["fedfisher"],
    name="own",
    solver=partial(ConjugateGradient, tolerance=1e-8, rcond=1e-3),
    max_influence=math.inf,  # of the clients' quadratics as they are
)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Three clients' updates with either kind of curvature, and the same weights."""
    return updates_by_curvature(tmp_path_factory.mktemp("kinds"), "kfac", "ekfac")


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_fedfisher_is_the_minimiser_of_the_tempered_quadratic(kinds, curvature, tmp_path):
    clients = kinds[curvature]
    assert clients[0].header.fed_by == {
        "network.2": Source("network.0", "relu"),
        "network.5": Source("network.2", "relu"),
    }
    assert clients[0].header.output_layer == "network.7"
    module = merge(clients, tmp_path, method=PRECISE)
    assert module.history[-1]["residual"] < 2e-4
    state = module.merged_state_dict()
    merged = {layer.name: layer.join(state) for layer in clients[0].layers}
    for name, matrix in merged.items():
        problem = oracle.quadratic(clients, name, merged)
        average = sum(p * w for p, w, _ in zip(*problem, strict=True))
        terms = list(zip(*problem, strict=True))
        gradients = sum(p * (f @ (average - w).flatten()).norm() for p, w, f in terms)
        left = sum(p * f @ (matrix.double() - w).flatten() for p, w, f in terms).norm()
        # Directions that count as ones without curvature leave a little of the gradient.
        assert left < 0.01 * gradients
    # The default comes as near as it promises.
    near = merge(clients, tmp_path, max_influence=math.inf).history[-1]["objective"]
    assert near <= 1.02 * module.history[-1]["objective"]


def _clients_of(make, root, data, **options):
    """Clients that start alike and hold unlike data."""
    torch.manual_seed(0)
    start, clients = make().state_dict(), []
    for client in range(2):
        model = make()
        model.load_state_dict(start)
        callback = FedFisherCallback(root / f"{client}.safetensors", max_samples=None, **options)
        trainer = quiet_trainer(root, max_epochs=3, callbacks=[callback])
        trainer.fit(model, DataLoader(data(client), batch_size=8, shuffle=True))
        clients.append(callback.update)
    return start, clients


class _HeadLast(TinyClassifier):
    def __init__(self):
        super().__init__(learning_rate=0.2)
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        del self.network

    def forward(self, x):
        return self.head(self.body(x).relu())


class _Unaligned(_HeadLast):
    def forward(self, x):
        return self.head(self.body(x).tanh())


class _HeadFirst(_HeadLast):
    def __init__(self):
        super().__init__()
        body = self.body
        del self.body
        self.body = body


def _points(client):
    generator = torch.Generator().manual_seed(client)
    size = 40 + 40 * client
    x = torch.randn(size, 5, generator=generator) + client
    return TensorDataset(x, torch.randint(0, 3, (size,), generator=generator))


OUTPUT_LAYERS = [
    (_HeadLast, "kfac", True),
    (_HeadFirst, "kfac", True),
    (_HeadLast, "ekfac", True),
    (_HeadFirst, "ekfac", True),
    (_Unaligned, "kfac", False),
    (_HeadLast, "dense", False),
]


@pytest.mark.parametrize(("make", "curvature", "aligned"), OUTPUT_LAYERS)
def test_an_aligned_layer_that_feeds_a_softmax_is_treated_as_the_output_layer(
    make, curvature, aligned, tmp_path, monkeypatch
):
    _, clients = _clients_of(make, tmp_path, _points, curvature=curvature)
    order = ["head", "body"] if make is _HeadFirst else ["body", "head"]
    assert [layer.name for layer in clients[0].layers] == order
    assert clients[0].header.output_layer == "head"
    merged = merge(clients, tmp_path, method=PRECISE).merged_state_dict()
    expected, starts = oracle.fedfisher(clients)
    monkeypatch.setattr(oracle, "INPUTS_POWER", 0.5)  # of no output layer
    headless = [with_header(client, output_layer="") for client in clients]
    others, _ = oracle.fedfisher(headless)
    for layer in clients[0].layers:
        found = layer.join(merged).double()
        move = float((expected[layer.name] - starts[layer.name]).norm())
        assert float((found - expected[layer.name]).norm()) < 0.02 * move
        if layer.name == "head":
            assert (float((found - others["head"]).norm()) > 0.1 * move) == aligned


class _EveryKind(TinyClassifier):
    """Products, a lookup, normalisations, groups, buffers and a frozen layer."""

    def __init__(self):
        super().__init__(learning_rate=0.2)
        del self.network  # or it would stay the first
        self.embedding = nn.Embedding(6, 4)
        self.network = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Conv2d(4, 4, 3, groups=2),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.Flatten(),
            nn.LayerNorm(16),
            nn.Linear(16, 6).requires_grad_(False),
            nn.Tanh(),
            nn.Linear(6, 3),
        )

    def forward(self, tokens):
        return self.network(self.embedding(tokens).mT.reshape(-1, 4, 4, 4))


def _tokens(client):
    generator = torch.Generator().manual_seed(client)
    size = 48 + 48 * client
    tokens = torch.randint(0, 4 + client, (size, 16), generator=generator)
    return TensorDataset(tokens, torch.randint(0, 3, (size,), generator=generator))


@pytest.mark.parametrize("budget", [0, 2**30])
@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_every_kind_of_layer_is_merged_as_its_dense_problem(curvature, budget, tmp_path):
    # Running statistics as training left them: what becomes of others has tests of its own.
    options = {"curvature": curvature, "estimate_statistics": False}
    start, clients = _clients_of(_EveryKind, tmp_path, _tokens, **options)
    product = "kronecker" if curvature == "kfac" else "ekfac"
    assert clients[0].header.kinds == {
        "embedding": f"embedding_{product}",
        "network.0": product,
        "network.1": "diagonal",
        "network.3": "diagonal",
        "network.4": "diagonal",
        "network.7": "diagonal",
        "network.10": product,
    }
    server = _EveryKind()
    server.load_state_dict(start)
    module = merge(clients, tmp_path, method=PRECISE, model=server, memory_budget=budget)
    merged = module.merged_state_dict()
    expected, starts = oracle.fedfisher(clients)
    for layer in clients[0].layers:
        move = float((expected[layer.name] - starts[layer.name]).norm())
        assert move > 1e-3 * float(starts[layer.name].norm())
        assert float((layer.join(merged).double() - expected[layer.name]).norm()) < 0.02 * move
    small, large = (48 / 144, 96 / 144)
    one, two = (client.buffers for client in clients)
    mean = small * one["network.1.running_mean"] + large * two["network.1.running_mean"]
    torch.testing.assert_close(merged["network.1.running_mean"], mean)
    variance = sum(
        p * (b["network.1.running_var"] + (b["network.1.running_mean"] - mean) ** 2)
        for p, b in ((small, one), (large, two))
    )
    torch.testing.assert_close(merged["network.1.running_var"], variance)
    assert merged.keys() == start.keys() - {"network.8.weight", "network.8.bias"}
    for name, tensor in server.state_dict().items():
        assert torch.equal(tensor, merged.get(name, start[name]))
