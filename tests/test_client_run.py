"""What a client refuses before its training, and what it saves after it."""

import copy

import pytest
import torch
from helpers.federation import TinyClassifier, quiet_trainer, tiny_data, tiny_loader, tiny_model
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_fedfisher import (
    ClientUpdate,
    FedFisherCallback,
    UnsupportedModelError,
    extract_curvature,
    merge_updates,
)

X, Y = tiny_data().tensors


class _Steps(Callback):
    """Counts the training steps that were made."""

    def __init__(self):
        self.count = 0

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.count += 1


def _fit(root, callback, model=None, loader=None, **options):
    """Fits, and gives the error that was raised, the number of steps and the module."""
    steps, model = _Steps(), tiny_model() if model is None else model
    trainer = quiet_trainer(root, callbacks=[steps, callback], **options)
    error = None
    try:
        trainer.fit(model, tiny_loader() if loader is None else loader)
    except (ValueError, OSError) as caught:
        error = caught
    return error, steps.count, model


class _Breaking(Callback):
    """Breaks the module after the first epoch, so that the extraction fails."""

    def on_train_epoch_end(self, trainer, pl_module):
        def fail(module, args):
            raise ValueError("late")

        pl_module.network[7].register_forward_pre_hook(fail)


def _loader(labels):
    return DataLoader(TensorDataset(X, labels), batch_size=4)


def _same(update, extracted):
    """Makes sure that an update holds the curvature that was extracted."""
    for name, block in extracted.blocks.items():
        expected, found = block.diagonal(), update.blocks[name].diagonal()
        assert (found - expected).norm() <= 1e-3 * expected.norm(), name


class _Stream(IterableDataset):
    def __iter__(self):
        return iter([{"image": x, "label": y} for x, y in zip(X, Y, strict=True)])


class _OfMappings(TinyClassifier):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["image"], batch["label"]), batch_idx)


def test_one_label_among_many_is_found_before_the_training(tmp_path):
    labels = Y.clone()
    labels[17] = 9
    error, steps, _ = _fit(tmp_path, FedFisherCallback(), loader=_loader(labels))
    assert "ignore_index=" in str(error)
    assert steps == 0


@pytest.mark.parametrize("told", [True, False])
def test_a_label_that_is_ignored_is_not_observed(tmp_path, told):
    class Void(TinyClassifier):
        def __init__(self):
            super().__init__()
            self.loss = None if told else nn.CrossEntropyLoss(ignore_index=9)

        def training_step(self, batch, batch_idx):
            return functional.cross_entropy(self(batch[0]), batch[1], ignore_index=9)

    labels = Y.clone()
    labels[[3, 17]] = 9
    callback = FedFisherCallback(ignore_index=9 if told else None, upload_budget=None)
    error, _, model = _fit(tmp_path, callback, Void(), _loader(labels))
    assert error is None
    model.loss = None
    _same(callback.update, extract_curvature(model, _loader(labels.masked_fill(labels == 9, -100))))


def test_the_first_batch_of_a_stream_is_rehearsed(tmp_path):
    loader = DataLoader(_Stream(), batch_size=4)
    error, steps, _ = _fit(tmp_path, FedFisherCallback(num_samples=21), _OfMappings(), loader)
    assert "a batch is dict, not a pair (x, y): pass forward=" in str(error)
    assert steps == 0
    callback = FedFisherCallback(num_samples=21, forward=lambda m, b: (m(b["image"]), b["label"]))
    error, steps, _ = _fit(tmp_path, callback, _OfMappings(), loader)
    assert error is None
    assert steps
    assert callback.update.header.curvature_samples == 21


def test_what_a_training_step_leaves_is_rehearsed_after_the_first(tmp_path):
    class Growing(TinyClassifier):
        def forward(self, x):
            out = super().forward(x)
            return out if self.stepped == 0 else out.detach()

        def on_train_batch_start(self, batch, batch_idx):
            self.stepped = 0

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.stepped = 1

    model = Growing()
    model.stepped = 0

    class Stepping(FedFisherCallback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.stepped = 1  # the module's own hook comes after those of callbacks
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    error, steps, _ = _fit(tmp_path, Stepping(), model, max_epochs=3)
    assert "no tensor with a gradient" in str(error)
    assert steps == 1


def test_pruning_that_begins_with_the_training_is_no_trouble(tmp_path):
    class Pruned(TinyClassifier):
        def on_train_batch_start(self, batch, batch_idx):
            if not prune.is_pruned(self):
                prune.l1_unstructured(self.network[5], "weight", amount=0.5)

    callback = FedFisherCallback()
    error, _, _ = _fit(tmp_path, callback, Pruned())
    assert error is None
    assert "network.5.weight_orig" in callback.update.parameters
    assert "network.5.weight_mask" in callback.update.buffers


def test_a_file_that_cannot_be_written_is_told_before_the_training(tmp_path):
    (tmp_path / "runs").write_text("a file")
    error, steps, _ = _fit(tmp_path, FedFisherCallback(tmp_path / "runs" / "u.safetensors"))
    assert "runs" in str(error)
    assert steps == 0


def test_nothing_of_the_rehearsal_is_left_behind(tmp_path):
    callback = FedFisherCallback()
    _fit(tmp_path, callback)
    assert list(callback.path.parent.iterdir()) == [callback.path]


def test_trained_weights_are_kept_where_the_extraction_fails(tmp_path):
    callback = FedFisherCallback(metadata={"site": "a"})
    trainer = quiet_trainer(tmp_path, callbacks=[_Breaking(), callback], max_epochs=1)
    model = tiny_model()
    with pytest.raises(ValueError, match="late") as caught:
        trainer.fit(model, tiny_loader())
    (note,) = [n for n in caught.value.__notes__ if "trained weights" in n]
    path = tmp_path / "fedfisher" / "update.weights.safetensors"
    assert str(path) in note
    update = ClientUpdate.open(path)
    update.verify()
    assert (update.header.curvature, update.num_samples) == ("identity", 21)
    assert update.header.metadata["site"] == "a"
    for name, weight in model.named_parameters():
        assert torch.equal(update.parameters[name], weight)


def test_mixed_batches_are_for_training_and_clean_samples_stay_clean(tmp_path):
    class Mixing(TinyClassifier):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            soft = functional.one_hot(y, 3).float()
            return (x + x.flip(0)) / 2, (soft + soft.flip(0)) / 2

    callback = FedFisherCallback(dataloader=_loader(Y), upload_budget=None)
    error, _, model = _fit(tmp_path, callback, Mixing())
    assert error is None
    _same(callback.update, extract_curvature(model, _loader(Y)))
    error, steps, _ = _fit(tmp_path, FedFisherCallback(), Mixing())
    assert "dataloader=" in str(error)
    assert steps == 0


class _Teacher(TinyClassifier):
    def __init__(self):
        super().__init__()
        self.network = tiny_model().network
        self.teacher = copy.deepcopy(self.network).requires_grad_(False)

    def on_train_batch_end(self, *_):
        with torch.no_grad():
            for mean, p in zip(self.teacher.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(p, 0.1)


def test_a_teacher_that_follows_its_student_is_averaged_with_a_word(tmp_path):
    paths, teachers = [], []
    for k in range(2):
        callback = FedFisherCallback(tmp_path / f"{k}.safetensors", upload_budget=None)
        with pytest.warns(UserWarning, match=r"frozen parameters changed.*teacher\.0\.weight"):
            error, _, model = _fit(tmp_path, callback, _Teacher(), _loader(Y.roll(k)))
        assert error is None
        paths.append(callback.path)
        teachers.append(model.state_dict()["teacher.5.weight"])
    merged = merge_updates(paths).state_dict["teacher.5.weight"]
    assert not torch.equal(*teachers)
    torch.testing.assert_close(merged, sum(teachers) / 2)


def test_heads_that_the_loss_alone_knows_are_averaged(tmp_path):
    class Auxiliary(TinyClassifier):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.side = nn.Linear(16, 3)
            self.log_scale = nn.Parameter(torch.zeros(()))

        def training_step(self, batch, batch_idx):
            features = self.network[:5](batch[0])
            side = functional.cross_entropy(self.side(features), batch[1])
            return super().training_step(batch, batch_idx) + side * self.log_scale.exp()

    paths, models = [], []
    for k in range(2):
        callback = FedFisherCallback(tmp_path / f"{k}.safetensors", upload_budget=None)
        error, _, model = _fit(tmp_path, callback, Auxiliary(), _loader(Y.roll(k)))
        assert error is None
        paths.append(callback.path)
        models.append(model.state_dict())
    merged = merge_updates(paths).state_dict
    for name in ("side.weight", "side.bias", "log_scale"):
        assert not torch.equal(models[0][name], models[1][name])
        torch.testing.assert_close(merged[name], (models[0][name] + models[1][name]) / 2)


@pytest.mark.parametrize("wrap", ["module", "in place", "part"])
def test_a_compiled_client_sends_what_another_one_does(tmp_path, wrap):
    model = tiny_model()
    if wrap == "part":
        model.network = torch.compile(model.network, backend="eager")
    elif wrap == "in place":
        model.compile(backend="eager")
    compiled, plain = (FedFisherCallback(tmp_path / f"{k}.safetensors") for k in "ab")
    fitted = torch.compile(model, backend="eager") if wrap == "module" else model
    assert _fit(tmp_path, compiled, fitted)[0] is None
    assert _fit(tmp_path, plain)[0] is None
    assert compiled.update.parameters.keys() == plain.update.parameters.keys()
    merge_updates([compiled.path, plain.path])


class _Store(torch.utils.data.Dataset):
    data = None

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return self.data[index]


def _open_store(_):
    torch.utils.data.get_worker_info().dataset.data = tiny_data()


def test_a_data_set_that_its_workers_open(tmp_path):
    loader = DataLoader(_Store(), batch_size=4, num_workers=1, worker_init_fn=_open_store)
    callback = FedFisherCallback(upload_budget=None)
    error, _, model = _fit(tmp_path, callback, loader=loader)
    assert error is None
    _same(callback.update, extract_curvature(model, _loader(Y)))


def test_a_held_loss_of_another_kind_is_refused_before_the_training(tmp_path):
    model = tiny_model()
    model.loss = nn.MSELoss()
    error, steps, _ = _fit(tmp_path, FedFisherCallback(), model)
    assert isinstance(error, UnsupportedModelError)
    assert "loss is a MSELoss" in str(error)
    assert steps == 0


def test_layers_frozen_or_unfrozen_midway_are_sent_as_others_send_them(tmp_path):
    class Midway(TinyClassifier):
        def __init__(self, first, then):
            super().__init__()
            self.network = tiny_model().network
            self.then = then
            self.network[5].requires_grad_(first)

        def on_train_epoch_end(self):
            self.network[5].requires_grad_(self.then)

    paths = []
    for name, first, then in (
        ("frozen", True, False),
        ("thawed", False, True),
        ("all", True, True),
    ):
        callback = FedFisherCallback(tmp_path / f"{name}.safetensors")
        error, _, _ = _fit(tmp_path, callback, Midway(first, then), max_epochs=2)
        assert error is None
        assert callback.update.header.kinds["network.5"] == "kronecker"
        paths.append(callback.path)
    merge_updates(paths)


def test_a_teacher_with_tied_weights_follows_its_student(tmp_path):
    class Tied(_Teacher):
        def __init__(self):
            super().__init__()
            self.teacher.append(nn.Module())
            self.teacher[-1].weight = self.teacher[5].weight

    callback = FedFisherCallback(upload_budget=None)
    with pytest.warns(UserWarning, match="frozen parameters changed"):
        error, _, _ = _fit(tmp_path, callback, Tied())
    assert error is None
    assert callback.update.header.aliases["teacher.8.weight"] == "teacher.5.weight"


def test_a_forward_pass_sees_the_epoch_and_logs_nothing(tmp_path):
    class Ageing(TinyClassifier):
        seen = ()

        def forward(self, x):
            self.log("seen", 1.0)
            type(self).seen += (self.current_epoch, self.trainer.max_epochs)
            return super().forward(x)

        def training_step(self, batch, batch_idx):
            return functional.cross_entropy(self.network(batch[0]), batch[1])

    error, _, _ = _fit(tmp_path, FedFisherCallback(), Ageing(), max_epochs=2)
    assert error is None
    assert max(Ageing.seen) == 2


def test_a_loader_that_makes_its_batches_itself_is_read_as_it_is(tmp_path):
    class Scaled(DataLoader):
        def __iter__(self):
            return ((2 * x, y) for x, y in super().__iter__())

    loader = Scaled(tiny_data(), batch_size=4)
    error, steps, _ = _fit(tmp_path, FedFisherCallback(), loader=loader)
    assert "num_samples=" in str(error)
    assert steps == 0
    callback = FedFisherCallback(num_samples=21, upload_budget=None)
    error, _, model = _fit(tmp_path, callback, loader=loader)
    assert error is None
    doubled = DataLoader(TensorDataset(2 * X, Y), batch_size=4)
    expected, found = extract_curvature(model, doubled, positions=None), callback.update
    (own,) = [found.blocks[name] for name in ("network.7",)]
    torch.testing.assert_close(own.diagonal(), expected.blocks["network.7"].diagonal())


def test_batches_that_the_trainer_leaves_out_are_told(tmp_path):
    with pytest.warns(UserWarning, match="leaves batches out"):
        _fit(tmp_path, FedFisherCallback(), limit_train_batches=2)


def test_nothing_is_claimed_to_be_written_under_fast_dev_run(tmp_path):
    trainer = quiet_trainer(
        tmp_path, callbacks=[_Breaking(), FedFisherCallback()], fast_dev_run=True
    )
    with pytest.raises(ValueError, match="late") as caught:
        trainer.fit(tiny_model(), tiny_loader())
    assert caught.value.__notes__ == ["Nothing is written under fast_dev_run"]
    assert not list(tmp_path.rglob("*.safetensors"))
