"""A client's running statistics: those of its samples, with the means from which they follow."""

import copy

import pytest
import torch
from helpers.federation import NormedClassifier, quiet_trainer, tiny_data, tiny_loader
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_fedfisher import ClientUpdate, FedFisherCallback, extract_curvature
from lightning_fedfisher.batch_norms import Normalized, buffer_names
from lightning_fedfisher.distributed.processes import Shard
from lightning_fedfisher.errors import BudgetError
from lightning_fedfisher.extraction.running_statistics import StatisticsPass, trained_norms
from lightning_fedfisher.layers import find_layers


class Branches(nn.Module):
    """Convolutions of every kind before a norm, and norms behind other things."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 12, (3, 1), groups=6, padding=(1, 0), dilation=1)
        self.norm2 = nn.BatchNorm2d(12)
        self.grouped = nn.Conv2d(12, 6, 1, groups=2, bias=False)
        self.norm3 = nn.BatchNorm2d(6, affine=False)
        self.shared = nn.Conv2d(6, 6, 1)
        self.norm4 = nn.BatchNorm2d(6)
        self.norm5 = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6, 4)
        self.norm6 = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.norm1(self.first(x)))
        x = functional.silu(self.norm2(self.depthwise(x)))
        x = x[:, :6] + self.norm3(self.grouped(x))
        x = self.norm4(self.shared(self.shared(x)))  # of a layer that is called twice
        x = self.norm5(x + 1)  # of no layer's outputs
        return self.head(self.norm6(self.hidden(x.mean((2, 3)))))


def _branches(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Branches().double()


def _batches(sizes=(5, 7), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (1 + torch.randn(n, 2, 6, 5, generator=generator).double(), torch.arange(n) % 3)
        for n in sizes
    ]


def _extract(model, batches=None, **options):
    kinds = {"curvature": "kfac", "estimate_statistics": True, "progress": False}
    return extract_curvature(model, _batches() if batches is None else batches, **kinds | options)


FED = {
    "norm1": Normalized("first"),
    "norm2": Normalized("depthwise", 6),
    "norm3": Normalized("grouped", 2),
    "norm6": Normalized("hidden"),
}


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal", "input_gram", "dense"])
def test_statistics_are_those_that_torch_gives(curvature):
    model = _branches().train()
    expected = update_bn_by_samples(model)
    before = copy.deepcopy(model.state_dict())
    found = _extract(model, curvature=curvature).statistics
    assert found.buffers.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found.buffers[name], tensor, rtol=1e-10, atol=1e-12)
    assert found.normalized == FED
    assert all(module.training for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def update_bn_by_samples(model):
    """`update_bn`, with each batch weighing its samples."""
    sums: dict[str, torch.Tensor] = {}
    total = 0
    for batch, _ in _batches():
        copied = copy.deepcopy(model)
        update_bn([batch], copied)
        for name, tensor in copied.state_dict().items():
            if "running" in name:
                sums[name] = sums.get(name, 0) + len(batch) * tensor
        total += len(batch)
    return {name: tensor / total for name, tensor in sums.items()}


def test_means_give_the_mean_of_outputs_for_any_weights():
    """Exact for the layer's own weights, whose outputs the norm has seen."""
    model = _branches().train()
    found = _extract(model).statistics
    for path, norm in found.normalized.items():
        (layer,) = [layer for layer in find_layers(model) if layer.name == norm.layer]
        weights = layer.join(dict(model.named_parameters()))
        means = found.input_means[norm.layer]
        assert means.shape == (norm.groups, layer.shape[1])
        outputs = (weights * means.repeat_interleave(len(weights) // norm.groups, 0)).sum(1)
        mean = found.buffers[buffer_names(path)[0]]
        torch.testing.assert_close(outputs, mean, rtol=1e-10, atol=1e-12)


def test_curvature_is_that_of_a_model_with_these_statistics():
    model = _branches().train()
    found = _extract(model, fisher="exact", positions=None)
    given = copy.deepcopy(model)
    given.load_state_dict(found.statistics.buffers, strict=False)
    expected = extract_curvature(
        given.eval(), _batches(), "kfac", fisher="exact", positions=None, progress=False
    )
    for name, block in expected.blocks.items():
        for part, tensor in block.tensors().items():
            torch.testing.assert_close(found.blocks[name].tensors()[part], tensor)


def test_norms_in_eval_mode_stay_as_they_are():
    model = _branches().train()
    model.norm1.eval()
    assert trained_norms(model) == ("norm2", "norm3", "norm4", "norm5", "norm6")
    found = _extract(model).statistics
    assert not {*buffer_names("norm1")} & found.buffers.keys()
    assert "norm1" not in found.normalized
    assert not _extract(model.eval()).statistics.buffers
    assert not _extract(model.train(), estimate_statistics=False).statistics.buffers


def test_single_samples_are_left_out():
    model = _branches().train()
    whole, alone = _batches((6,)), _batches((6, 1))
    for name, tensor in _extract(model, whole).statistics.buffers.items():
        assert torch.equal(_extract(model, alone).statistics.buffers[name], tensor)
    with pytest.warns(UserWarning, match="no batch has the two samples"):
        nothing = _extract(model, _batches((1, 1)), curvature="input_gram").statistics
    assert not nothing.buffers
    assert not nothing.normalized


class _Once(IterableDataset):
    """Samples that can be read once, however often they are asked for."""

    def __init__(self):
        self.left = [(x, y) for xs, ys in _batches() for x, y in zip(xs, ys, strict=True)]

    def __iter__(self):
        while self.left:
            yield self.left.pop()


def test_a_stream_keeps_the_statistics_and_says_so():
    for stream in (iter(_batches()), DataLoader(_Once(), batch_size=6)):
        with pytest.warns(UserWarning, match="as training left them"):
            assert not _extract(_branches().train(), stream).statistics.buffers


def test_a_sorted_data_set_has_the_statistics_of_a_shuffled_one():
    """Batches of one class vary less: samples are mixed, as in training."""
    model = _branches().train()
    x = torch.cat([4.0 * label + _batches((60,), label)[0][0] for label in range(3)])
    y = torch.arange(3).repeat_interleave(60)
    loader = DataLoader(TensorDataset(x, y), batch_size=20)
    found = _extract(model, loader, curvature="input_gram").statistics.buffers
    update_bn([x], model)
    exact = model.norm1.running_var
    torch.testing.assert_close(found["norm1.running_var"], exact, rtol=0.15, atol=0)


class Unusual(nn.Module):
    """A norm called by keyword, a layer on vectors and on tokens, and statistics that stay here."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.other, self.kept = nn.Linear(4, 4), nn.BatchNorm1d(4)
        del self.kept.running_mean, self.kept.running_var
        self.kept.register_buffer("running_mean", torch.zeros(4), persistent=False)
        self.kept.register_buffer("running_var", torch.ones(4), persistent=False)

    def forward(self, x):
        first = self.norm(input=self.layer(x))
        return self.kept(self.other(first)) + self.layer(x.unsqueeze(1)).squeeze(1)


def test_unusual_calls_and_buffers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Unusual().train()
    batch = {"scale": torch.tensor(1.0), "x": torch.randn(6, 3), "y": torch.zeros(6).long()}
    found = _extract(model, [batch], forward=lambda m, b: (m(b["x"]), b["y"]))
    assert set(found.statistics.buffers) == {*buffer_names("norm")}
    assert not found.statistics.normalized  # its layer is called twice
    ClientUpdate.from_model(model, found.header(6), found.blocks, found.statistics)


def test_statistics_are_sent_in_the_type_of_the_model(tmp_path):
    model = _branches().to(torch.bfloat16).train()
    found = _extract(model, [(x.float(), y) for x, y in _batches()])
    update = ClientUpdate.from_model(model, found.header(12), found.blocks, found.statistics)
    opened = ClientUpdate.open(update.save(tmp_path / "client.safetensors"))
    assert opened.buffers["norm1.running_var"].dtype == torch.bfloat16


def test_a_budget_without_room_for_means_is_refused_before_training(tmp_path):
    layers = nn.Conv2d(1, 64, 1), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 11, groups=64, padding=5)
    network = nn.Sequential(*layers, nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(4096, 3))
    module = NormedClassifier()
    module.network = network
    callback = FedFisherCallback(tmp_path / "client.safetensors", upload_budget=0.1)
    with pytest.raises(BudgetError):
        quiet_trainer(tmp_path, callbacks=[callback]).fit(module, tiny_loader())
    assert network[1].num_batches_tracked == 0


def test_processes_find_what_one_finds():
    model = _branches().train()
    data = TensorDataset(*map(torch.cat, zip(*_batches((6, 6)), strict=True)))
    loader = DataLoader(data, batch_size=6)
    passes = []
    for rank in range(3):  # the last has nothing to run
        measured = StatisticsPass(
            model.eval(), find_layers(model), ("norm1", "norm2"), lambda m: m(data.tensors[0][:2])
        )
        for batch, _ in [*loader][rank : rank + 1]:
            measured.run(lambda m, x=batch: m(x))
        passes.append(measured)
    sums = [[*m._statistics.values(), *m._means.values()] for m in passes]
    places = [[sums[rank][i].sums for rank in range(3)] for i in range(len(sums[0]))]
    counter = iter(places)
    shard = Shard(0, 3, lambda tensor: sum(next(counter)))
    found = passes[2].finish(shard.total)
    whole = StatisticsPass(
        model, find_layers(model), ("norm1", "norm2"), lambda m: m(data.tensors[0][:2])
    )
    for batch, _ in loader:
        whole.run(lambda m, x=batch: m(x))
    expected = whole.finish(lambda tensor: tensor)
    assert found.normalized == expected.normalized
    for name, tensor in {**expected.buffers, **expected.input_means}.items():
        torch.testing.assert_close({**found.buffers, **found.input_means}[name], tensor)


class Validating(NormedClassifier):
    def validation_step(self, batch, batch_idx):
        assert not self.network[3][0].training


@pytest.mark.parametrize("validates", [False, True])
def test_the_callback_sends_statistics_anew(tmp_path, validates):
    module, loader = (Validating if validates else NormedClassifier)(), tiny_loader()
    loaders = [loader, *([tiny_loader(5)] if validates else [])]
    callback = FedFisherCallback(tmp_path / "client.safetensors")
    quiet_trainer(tmp_path, callbacks=[callback], max_epochs=2).fit(module, *loaders)
    update = ClientUpdate.open(callback.path)
    update.verify()
    assert update.header.normalized == {"network.3.0": Normalized("network.2")}
    batches = DataLoader(tiny_data(), batch_size=8)
    expected = extract_curvature(
        module.train(), batches, "kfac", estimate_statistics=True, progress=False
    ).statistics
    assert module.network[3][0].num_batches_tracked == 6
    for name in buffer_names("network.3.0"):
        assert torch.equal(update.buffers[name], expected.buffers[name])
        assert not torch.allclose(module.state_dict()[name], expected.buffers[name], rtol=1e-2)
    (layer,) = [layer for layer in update.layers if layer.name == "network.2"]
    assert torch.equal(update.input_mean(layer), expected.input_means["network.2"])
    plain = FedFisherCallback(tmp_path / "plain.safetensors", estimate_statistics=False)
    quiet_trainer(tmp_path, callbacks=[plain]).fit(module, loader)
    assert torch.equal(
        plain.update.buffers["network.3.0.running_var"], module.network[3][0].running_var
    )
    assert not plain.update.header.normalized
