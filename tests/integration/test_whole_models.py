"""From the clients' callback to the merge: models with buffers and shared or frozen weights."""

import pytest
import torch
from helpers.federation import TinyClassifier, quiet_trainer, tiny_loader
from helpers.merging import merge
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock, ResNet

from lightning_fedfisher import (
    ClientUpdate,
    FedFisherCallback,
    FisherMergeModule,
    MergeError,
    extract_curvature,
)


def test_a_torchvision_resnet_goes_through_callback_and_merge(tmp_path):
    class Residual(TinyClassifier):
        def __init__(self):
            super().__init__()
            # ResNet-18 up to its second stage: a block that keeps its input's shape, and one that
            # does not.
            self.network = ResNet(BasicBlock, [1, 1, 1, 1])
            self.network.layer3 = self.network.layer4 = nn.Identity()
            self.network.fc = nn.Linear(128, 3)

    torch.manual_seed(0)
    start = Residual().state_dict()
    updates, carried, models = [], [], []
    for client in range(2):
        generator = torch.Generator().manual_seed(client)
        x = 2 * torch.randn(6 + 6 * client, 3, 32, 32, generator=generator) + client
        data = TensorDataset(x, torch.arange(len(x)) % 3)
        model = Residual()
        model.load_state_dict(start)
        options = {"curvature": "diagonal", "estimate_statistics": False}
        callback = FedFisherCallback(tmp_path / f"{client}.safetensors", **options)
        anew = FedFisherCallback(tmp_path / f"{client}-anew.safetensors")
        trainer = quiet_trainer(tmp_path, callbacks=[callback, anew])
        trainer.fit(model, DataLoader(data, batch_size=3, shuffle=True))
        updates.append(callback.update)
        carried.append(anew.update)
        models.append(model.network)
    server = Residual()
    norms = {path for path, module in server.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert carried[0].header.normalized.keys() == norms
    assert torch.isfinite(
        merge(carried, tmp_path).merged_state_dict()["network.bn1.running_var"]
    ).all()
    merge(updates, tmp_path, model=server)
    means = [model.bn1.running_mean for model in models]
    variances = [model.bn1.running_var for model in models]
    pooled = (means[0] + 2 * means[1]) / 3
    spread = [v + (m - pooled).square() for m, v in zip(means, variances, strict=True)]
    merged = server.network
    torch.testing.assert_close(merged.bn1.running_mean, pooled)
    torch.testing.assert_close(merged.bn1.running_var, (spread[0] + 2 * spread[1]) / 3)
    assert merged.bn1.num_batches_tracked == models[1].bn1.num_batches_tracked == 4
    assert torch.isfinite(merged.eval()(torch.randn(2, 3, 32, 32))).all()


class _Tied(TinyClassifier):
    """A frozen stem, and two layers that share one weight."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 6).requires_grad_(False),
            nn.Tanh(),
            nn.Linear(6, 6),
            nn.Tanh(),
            nn.Linear(6, 6),
            nn.Tanh(),
            nn.Linear(6, 3),
        )
        self.network[5].weight = self.network[3].weight


def _tied_updates(root, **options):
    torch.manual_seed(0)
    start = _Tied().state_dict()
    updates = []
    for client in range(2):
        model = _Tied()
        model.load_state_dict(start)
        callback = FedFisherCallback(root / f"{client}.safetensors", **options)
        trainer = quiet_trainer(root, max_epochs=3, callbacks=[callback])
        trainer.fit(model, tiny_loader(seed=client))
        updates.append(callback.update)
    return start, updates


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal"])
def test_shared_weights_are_merged_once_and_frozen_ones_not_at_all(curvature, tmp_path):
    start, updates = _tied_updates(tmp_path, curvature=curvature)
    assert not any(name.startswith("network.1.") for name in updates[0].parameters)
    assert "network.5.weight" not in updates[0].parameters
    server = _Tied()
    server.load_state_dict(start)
    module = merge(updates, tmp_path, model=server, val=tiny_loader(seed=5, shuffle=False))
    merged = module.merged_state_dict()
    assert merged.keys() == start.keys() - {"network.1.weight", "network.1.bias"}
    assert torch.equal(merged["network.5.weight"], merged["network.3.weight"])
    assert server.network[5].weight is server.network[3].weight
    assert torch.equal(server.network[3].weight, merged["network.3.weight"])
    assert torch.equal(server.network[1].weight, start["network.1.weight"])
    for client in updates:
        assert not torch.equal(client.parameters["network.3.weight"], merged["network.3.weight"])


def test_frozen_weights_must_be_the_same_everywhere(tmp_path):
    start, updates = _tied_updates(tmp_path)
    with pytest.raises(ValueError, match=r"network\.1\.weight is frozen with digest"):
        FisherMergeModule(updates, model=_Tied())
    other = _Tied()
    other.load_state_dict(start | {"network.1.bias": torch.ones(6)})
    extracted = extract_curvature(other, tiny_loader())
    stranger = ClientUpdate.from_model(other, updates[0].header, extracted.blocks)
    with pytest.raises(MergeError, match=r"network\.1\.bias is frozen with digest"):
        FisherMergeModule([*updates, stranger])


def test_a_module_under_two_names_merges_with_its_buffers(tmp_path):
    class Twice(TinyClassifier):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))
            self.network = nn.Sequential(self.stem, nn.Linear(64, 3))

        def get_extra_state(self):
            return {"note": 1}

        def set_extra_state(self, state):
            pass

    torch.manual_seed(0)
    start, updates = Twice().state_dict(), []
    for client in range(2):
        model = Twice()
        model.load_state_dict(start)
        callback = FedFisherCallback(tmp_path / f"{client}.safetensors")
        trainer = quiet_trainer(tmp_path, callbacks=[callback])
        trainer.fit(model, tiny_loader(seed=client))
        updates.append(callback.update)
    server = Twice()
    merged = merge(updates, tmp_path, model=server).merged_state_dict()
    assert torch.equal(merged["network.0.1.running_mean"], merged["stem.1.running_mean"])
    assert torch.equal(server.stem[1].running_var, merged["stem.1.running_var"])
    assert merged.keys() == {name for name, t in start.items() if isinstance(t, torch.Tensor)}
