"""Closed-form heads from client to server: the merged head is that of all data in one place."""

import dataclasses

import pytest
import torch
from helpers.federation import quiet_trainer
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher import (
    ClientUpdate,
    FedFisherCallback,
    FisherMergeModule,
    MergeError,
    fit_closed_form_head,
    merge_updates,
)

CLASSES = 4


class _Pretrained(LightningModule):
    """A body that all clients share, and a head."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
            self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, index):
        return functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("nll", functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, index):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


def _data(samples=120):
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, CLASSES, (samples,), generator=generator)
    centres = 2 * torch.randn(CLASSES, 6, generator=generator)
    return TensorDataset(centres[y] + torch.randn(samples, 6, generator=generator), y)


def _by_class(data, clients):
    """The most uneven split: sorted by class."""
    order = data.tensors[1].argsort(stable=True)
    return [TensorDataset(*(t[rows] for t in data.tensors)) for rows in order.chunk(clients)]


def _loader(data):
    return DataLoader(data, batch_size=16, shuffle=True)


def _merged(updates, **options):
    return merge_updates(updates, method="closed_form_head", **options)


@pytest.mark.parametrize("clients", [2, 5, 40])
def test_the_merged_head_is_that_of_all_data_in_one_place(clients, tmp_path):
    data, model = _data(), _Pretrained()
    paths = []
    for index, part in enumerate(_by_class(data, clients)):
        update = fit_closed_form_head(model, _loader(part), progress=False)
        paths.append(update.save(tmp_path / f"{index}.safetensors"))
    together = _merged([fit_closed_form_head(model, _loader(data), progress=False)]).state_dict
    result = _merged(paths)
    assert result.solved
    assert not result.warnings
    for name, tensor in together.items():
        torch.testing.assert_close(result.state_dict[name], tensor, rtol=1e-6, atol=1e-6)
    model.load_state_dict(result.state_dict, strict=False)
    x, y = data.tensors
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.9


def test_it_is_ridge_regression_on_the_features(tmp_path):
    data, model = _data(), _Pretrained().double().eval()
    x, y = data.tensors[0].double(), functional.one_hot(data.tensors[1]).double()
    part = TensorDataset(x, data.tensors[1])
    update = fit_closed_form_head(model, _loader(part), progress=False)
    module = FisherMergeModule([update], method="closed_form_head", model=model)
    quiet_trainer(tmp_path, max_epochs=-1).fit(module)
    features = model.body(x).detach()
    centred = features - features.mean(0)
    weights = model.head.weight.detach()
    # The gradient of the fit is that of the ridge: one number for all weights.
    force = (y - y.mean(0)).mT @ centred - weights @ (centred.mT @ centred)
    ridge = (force * weights).sum() / weights.square().sum()
    assert ridge > 0
    torch.testing.assert_close(force, ridge * weights, rtol=1e-8, atol=1e-8)
    bias = y.mean(0) - weights @ features.mean(0)
    torch.testing.assert_close(model.head.bias.detach(), bias, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("how", ["fit", "validate", "predict"])
def test_the_callback_fits_a_head_without_training(how, tmp_path):
    data = _data()
    model, path = _Pretrained(), tmp_path / "client.safetensors"
    callback = FedFisherCallback(path, closed_form_head=True)
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[callback])
    getattr(trainer, how)(model, _loader(data))
    assert callback.path == path
    update = ClientUpdate.open(path)
    update.verify()
    # What training of the head did before does not matter, but the body's statistics do.
    expected = fit_closed_form_head(model, _loader(data), progress=False)
    assert (update.num_samples, update.header.curvature_samples) == (120, 120)
    assert not update.header.quantized
    for name, tensor in expected.parameters.items():
        torch.testing.assert_close(update.parameters[name], tensor, rtol=1e-9, atol=1e-9)


def test_other_callbacks_do_nothing_at_validation(tmp_path):
    callback = FedFisherCallback(tmp_path / "client.safetensors")
    quiet_trainer(tmp_path, callbacks=[callback]).validate(_Pretrained(), _loader(_data()))
    assert (callback.update, list(tmp_path.glob("*.safetensors"))) == (None, [])


def test_a_kind_of_curvature_beside_it_is_refused():
    with pytest.raises(ValueError, match="leave curvature= out"):
        FedFisherCallback(closed_form_head=True, curvature="diagonal")
    FedFisherCallback(closed_form_head=True, curvature="input_gram")


def test_a_head_may_be_named(tmp_path):
    callback = FedFisherCallback(tmp_path / "client.safetensors", closed_form_head="head")
    quiet_trainer(tmp_path, callbacks=[callback]).validate(_Pretrained(), _loader(_data()))
    assert [layer.name for layer in callback.update.layers] == ["head"]


def test_fits_on_other_bodies_are_refused():
    one, other = (
        fit_closed_form_head(_Pretrained(seed), _loader(_data()), progress=False) for seed in (0, 1)
    )
    with pytest.raises(MergeError, match="is of another model"):
        _merged([one, other])


def test_the_default_method_says_what_to_do_with_fits():
    update = fit_closed_form_head(_Pretrained(), _loader(_data()), progress=False)
    with pytest.raises(MergeError, match="method='closed_form_head'"):
        merge_updates([update])


def test_rounded_fits_are_close():
    data, model = _data(), _Pretrained()
    updates = [
        fit_closed_form_head(model, _loader(part), progress=False) for part in _by_class(data, 3)
    ]
    exact = _merged(updates).state_dict
    rounded = _merged([update.compressed(20.0) for update in updates]).state_dict
    for name in ("head.weight", "head.bias"):
        assert (rounded[name] - exact[name]).norm() < 0.05 * exact[name].norm()


def test_a_number_of_samples_may_be_told():
    update = fit_closed_form_head(_Pretrained(), _loader(_data()), num_samples=7, progress=False)
    assert (update.num_samples, update.header.curvature_samples) == (7, 120)


def test_a_squared_error_that_cannot_be_is_refused_by_name():
    updates = [
        fit_closed_form_head(_Pretrained(), _loader(part), progress=False)
        for part in _by_class(_data(), 3)
    ]
    fit = dataclasses.replace(updates[1].header.fit, squared_error=10.0)
    header = dataclasses.replace(updates[1].header, fit=fit)
    forged = ClientUpdate(header, updates[1]._tensors, "mallory")
    with pytest.raises(MergeError, match="mallory claims labels of mean squared length 1") as error:
        _merged([updates[0], forged, updates[2]])
    assert len(error.value.offenders) == 1


def test_positions_count_as_observations_without_a_bias_too():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 50, 8, generator=generator)
    y = x @ torch.randn(8, 1, generator=generator)
    model, lines = nn.Linear(8, 1, bias=False), {"likelihood": "gaussian", "progress": False}
    by_sample = fit_closed_form_head(model, [(x, y)], **lines)
    flat = fit_closed_form_head(model, [(x.flatten(0, 1), y.flatten(0, 1))], **lines)
    found, expected = (_merged([update]).state_dict["weight"] for update in (by_sample, flat))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    truth = torch.linalg.lstsq(x.flatten(0, 1), y.flatten(0, 1)).solution.mT
    torch.testing.assert_close(found.float(), truth, rtol=1e-3, atol=1e-3)


def test_bodies_with_other_statistics_are_refused():
    one, other = _Pretrained(), _Pretrained()
    other.body[1].running_mean += 1
    updates = [fit_closed_form_head(m, _loader(_data()), progress=False) for m in (one, other)]
    with pytest.raises(MergeError, match=r"is of another model than .*body.1.running_mean"):
        _merged(updates)


def test_what_a_fit_has_sent_is_not_sent_again(tmp_path):
    data, path = _data(), tmp_path / "client.safetensors"
    callback = FedFisherCallback(path, closed_form_head=True)
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[callback])
    model = _Pretrained()
    trainer.fit(model, _loader(data))
    written = path.read_bytes()
    trainer.validate(model, _loader(_data(20)))
    trainer.predict(model, DataLoader(TensorDataset(data.tensors[0]), batch_size=8))
    assert path.read_bytes() == written
    assert callback.update.num_samples == 120
    callback.update.parameters["head.weight"].mul_(2)  # no tensor of inference mode


def test_one_loader_in_a_list_is_that_loader(tmp_path):
    callback = FedFisherCallback(tmp_path / "client.safetensors", closed_form_head=True)
    trainer = quiet_trainer(tmp_path, callbacks=[callback])
    trainer.validate(_Pretrained(), [_loader(_data())])
    assert callback.update.num_samples == 120
    callback.update.parameters["head.weight"].mul_(2)


def test_fewer_than_one_sample_is_refused():
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        fit_closed_form_head(_Pretrained(), _loader(_data()), num_samples=0)
