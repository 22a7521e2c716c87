"""FedFisherCallback: when it extracts, what it writes, and that it changes nothing else."""

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.federation import (
    TinyClassifier,
    quiet_trainer,
    tiny_data,
    tiny_loader,
    tiny_model,
)
from helpers.twins import twin_of
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from lightning_fedfisher import (
    ClientUpdate,
    FedFisherCallback,
    UnsupportedModelError,
    UpdateError,
    extract_curvature,
)
from lightning_fedfisher.extraction.tracing import ModelTracer


def fit(root, *callbacks, model=None, loader=None, **options):
    model = tiny_model() if model is None else model
    trainer = quiet_trainer(root, callbacks=list(callbacks), **options)
    trainer.fit(model, tiny_loader() if loader is None else loader)
    return model


def test_no_arguments_write_the_update_below_the_root(tmp_path):
    callback = FedFisherCallback()
    model = fit(tmp_path, callback)
    path = tmp_path / "fedfisher" / "update.safetensors"
    assert callback.path == path
    update = ClientUpdate.open(path)
    assert update.num_samples == update.header.curvature_samples == 21
    assert (update.header.curvature, update.header.fisher) == ("kfac", "normalised")
    for name, weight in model.named_parameters():
        assert torch.equal(update.parameters[name], weight)


def test_the_log_directory_of_a_logger_comes_first(tmp_path):
    callback = FedFisherCallback()
    logger = CSVLogger(tmp_path, name="runs", version=7)
    fit(tmp_path, callback, logger=logger)
    assert callback.path == tmp_path / "runs" / "version_7" / "fedfisher" / "update.safetensors"


@pytest.mark.parametrize("curvature", ["identity", "diagonal", "input_gram", "kfac"])
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical", "normalised"])
def test_agrees_with_extraction_without_a_trainer(tmp_path, curvature, fisher):
    callback = FedFisherCallback(curvature=curvature, fisher=fisher, max_samples=13, seed=3)
    model = fit(tmp_path, callback)
    alone = extract_curvature(
        model, tiny_loader(), curvature, fisher=fisher, max_samples=13, seed=3
    )
    assert callback.update.layers == alone.layers
    for name, block in callback.update.blocks.items():
        for part, tensor in block.tensors().items():
            torch.testing.assert_close(tensor, alone.blocks[name].tensors()[part])


def test_training_is_bitwise_the_same_with_and_without_it(tmp_path):
    class Snapshot(Callback):
        """What another callback sees after the extraction."""

        def on_train_end(self, trainer, pl_module):
            self.random = torch.get_rng_state()
            self.grads = [p.grad.clone() for p in pl_module.parameters()]
            self.modes = [m.training for m in pl_module.modules()]
            self.hooks = [len(m._forward_hooks) for m in pl_module.modules()]

    seen = []
    for callbacks in ([], [FedFisherCallback(curvature="diagonal", fisher="mc")]):
        torch.manual_seed(5)
        snapshot = Snapshot()
        model = fit(tmp_path, *callbacks, snapshot)
        seen.append((snapshot, copy.deepcopy(model.state_dict())))
    (plain, plain_state), (extracted, extracted_state) = seen
    assert torch.equal(plain.random, extracted.random)
    assert plain.modes == extracted.modes
    assert plain.hooks == extracted.hooks
    for before, after in zip(plain.grads, extracted.grads, strict=True):
        assert torch.equal(before, after)
    for name, tensor in plain_state.items():
        assert torch.equal(tensor, extracted_state[name])


def test_fast_dev_run_extracts_one_batch_and_writes_nothing(tmp_path):
    callback = FedFisherCallback()
    fit(tmp_path, callback, fast_dev_run=True)
    assert callback.update.header.curvature_samples == 8
    assert callback.path is None
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_explicit_loader_and_sample_count_are_used(tmp_path):
    other = DataLoader(tiny_data(seed=9, samples=11), batch_size=4)
    callback = FedFisherCallback(dataloader=other, num_samples=1000)
    model = fit(tmp_path, callback)
    assert callback.update.num_samples == 1000
    expected = extract_curvature(model, other)
    for name, block in callback.update.blocks.items():
        torch.testing.assert_close(block.trace(), expected.blocks[name].trace())


def test_forward_serves_batches_of_another_form(tmp_path):
    class Dictionaries(torch.utils.data.Dataset):
        data = tiny_data()

        def __len__(self):
            return len(self.data)

        def __getitem__(self, index):
            x, y = self.data[index]
            return {"image": x, "label": y}

    class Model(TinyClassifier):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["image"], batch["label"]), batch_idx)

    def forward(module, batch):
        return module(batch["image"]), batch["label"]

    torch.manual_seed(0)
    callback = FedFisherCallback(forward=forward)
    model = fit(tmp_path, callback, model=Model(), loader=DataLoader(Dictionaries(), batch_size=5))
    expected = extract_curvature(model, tiny_loader())
    for name, block in callback.update.blocks.items():
        torch.testing.assert_close(block.trace(), expected.blocks[name].trace())


def test_batches_are_prepared_as_in_training(tmp_path):
    class Scaling(TinyClassifier):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            return 100 * x, y

    torch.manual_seed(0)
    callback = FedFisherCallback()
    model = fit(tmp_path, callback, model=Scaling())
    x, y = tiny_data().tensors
    expected = extract_curvature(model, DataLoader(TensorDataset(100 * x, y), batch_size=8))
    found = callback.update.blocks["network.0"].column_factor
    torch.testing.assert_close(found, expected.blocks["network.0"].column_factor)


def test_gradient_checkpointing_is_refused_before_training(tmp_path):
    class Checkpointed(TinyClassifier):
        def forward(self, x):
            return checkpoint(self.network, x, use_reentrant=False)

    with pytest.raises(UnsupportedModelError, match="gradient checkpointing"):
        fit(tmp_path, FedFisherCallback(), model=Checkpointed())


def test_every_logger_hears_of_the_extraction(tmp_path):
    class Recorder(Logger):
        name, version = "recorder", "0"

        def __init__(self):
            super().__init__()
            self.metrics = {}

        def log_metrics(self, metrics, step=None):
            self.metrics |= metrics

        def log_hyperparams(self, params, *args, **kwargs):
            pass

    loggers = [Recorder(), Recorder()]
    callback = FedFisherCallback()
    fit(tmp_path, callback, logger=loggers)
    for logger in loggers:
        assert logger.metrics["fedfisher/curvature_samples"] == 21
        assert logger.metrics["fedfisher/upload_bytes"] == callback.path.stat().st_size
        assert logger.metrics["fedfisher/trace/network.0"] > 0


def test_rehearsals_and_extraction_copy_the_weights_once_each(tmp_path, monkeypatch):
    copied, original = [], nn.Parameter.__deepcopy__

    def counting(parameter, memo):
        copied.append(tuple(parameter.shape))
        return original(parameter, memo)

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", counting)
    model = fit(tmp_path, FedFisherCallback())
    # Before the training, after its first step, and at its end.
    assert copied == 3 * [tuple(p.shape) for p in model.parameters()]


def test_a_model_is_traced_once_and_packed_once(tmp_path, monkeypatch):
    counts = Counter()

    def counting(owner, name):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    counting(ModelTracer, "trace")
    counting(ClientUpdate, "compressed")
    fit(tmp_path, FedFisherCallback())
    # Before the training and after its first step; the extraction knows the last one.
    assert counts == {"trace": 2, "compressed": 1}


def test_the_file_is_not_read_again_to_log_it(tmp_path, monkeypatch):
    opened, original = [], ClientUpdate.open
    monkeypatch.setattr(ClientUpdate, "open", lambda path: (opened.append(path), original(path))[1])
    logged = {}

    def log_update(loggers, prefix, update, curvature, metrics, step):
        logged.update(update=update, metrics=metrics)

    monkeypatch.setattr("lightning_fedfisher.callback.log_update", log_update)
    callback = FedFisherCallback(metadata={"site": "a"})
    fit(tmp_path, callback, logger=CSVLogger(tmp_path))
    monkeypatch.undo()
    assert len(opened) == 1  # in the rehearsal
    assert callback.path not in opened
    read, update = ClientUpdate.open(callback.path), logged["update"]
    assert (update.source, update.digest) == (read.source, read.digest)
    assert logged["metrics"]["upload_bytes"] == read.upload_bytes == update.upload_bytes
    assert callback.update.source == "this update"


def test_two_callbacks_write_two_files_and_never_the_same(tmp_path):
    one = FedFisherCallback(tmp_path / "one.safetensors")
    two = FedFisherCallback(tmp_path / "two.safetensors", curvature="diagonal", fisher="exact")
    assert one.state_key != two.state_key
    fit(tmp_path, one, two)
    assert ClientUpdate.open(one.path).header.curvature == "kfac"
    assert ClientUpdate.open(two.path).header.curvature == "diagonal"
    with pytest.raises(ValueError, match="the same file"):
        fit(tmp_path, FedFisherCallback(), FedFisherCallback(curvature="diagonal"))


@pytest.mark.parametrize(
    "averaging",
    [
        EMAWeightAveraging(),
        StochasticWeightAveraging(0.1),
        twin_of(EMAWeightAveraging, twin_of(WeightAveraging, Callback))(),
        twin_of(StochasticWeightAveraging, Callback)(),
    ],
)
def test_warns_before_a_weight_averaging_callback(tmp_path, averaging):
    with pytest.warns(UserWarning, match="place it after"):
        fit(tmp_path, FedFisherCallback(), averaging)


def test_an_empty_client_is_an_error(tmp_path):
    empty = DataLoader(torch.utils.data.Subset(tiny_data(), []), batch_size=8)
    with pytest.raises(ValueError, match="the client holds no samples"):
        fit(tmp_path, FedFisherCallback(), loader=empty)


def test_warns_when_nothing_was_trained(tmp_path):
    callback = FedFisherCallback()
    with pytest.warns(UserWarning, match="extracted nothing"):
        fit(tmp_path, callback, max_epochs=0)
    assert callback.update is None


def test_a_finished_checkpoint_resumed_is_noticed(tmp_path):
    model = tiny_model()
    trainer = quiet_trainer(tmp_path, callbacks=[FedFisherCallback()])
    trainer.fit(model, tiny_loader())
    trainer.save_checkpoint(tmp_path / "finished.ckpt")
    again = FedFisherCallback()
    trainer = quiet_trainer(tmp_path, callbacks=[again])
    with pytest.warns(UserWarning, match="extracted nothing"):
        trainer.fit(model, tiny_loader(), ckpt_path=tmp_path / "finished.ckpt", weights_only=True)
    assert again.update is None


def test_an_exception_writes_nothing(tmp_path):
    class Failing(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, FedFisherCallback(), Failing())
    assert not list(tmp_path.rglob("*.safetensors*"))


def test_bad_options_are_refused_together():
    with pytest.raises(
        ValueError, match=r"(?s)curvature='tensor'.*fisher='true'.*likelihood='poisson'"
    ):
        FedFisherCallback(curvature="tensor", fisher="true", likelihood="poisson")
    for name in ("max_samples", "num_samples", "batch_size", "draws"):
        with pytest.raises(ValueError, match=name):
            FedFisherCallback(**{name: 0})
    with pytest.raises(ValueError, match="metadata must map strings"):
        FedFisherCallback(metadata={"round": 1})


def test_unsupported_models_are_refused_before_training(tmp_path):
    model = tiny_model()
    model.network[5] = nn.Sequential(
        nn.BatchNorm1d(16, track_running_stats=False), nn.Linear(16, 6)
    )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=r"network\.5\.0 normalises by the statistics"):
        fit(tmp_path, FedFisherCallback(), model=model)
    model.network[5] = nn.Linear(16, 6)
    model.loss = nn.CrossEntropyLoss(weight=torch.ones(3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match="loss is a CrossEntropyLoss with weight"):
        fit(tmp_path, FedFisherCallback(), model=model)
    for name, tensor in before.items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_loaders_that_hide_the_samples_are_refused_before_training(tmp_path):
    weighted = DataLoader(tiny_data(), sampler=WeightedRandomSampler([1.0] * 21, 21))
    with pytest.raises(ValueError, match="pass `dataloader=`"):
        fit(tmp_path, FedFisherCallback(), loader=weighted)
    several = [tiny_loader(), tiny_loader()]
    with pytest.raises(ValueError, match="several loaders, or none"):
        fit(tmp_path, FedFisherCallback(), loader=several)


def test_an_iterable_needs_its_number_of_samples_and_a_limit(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(tiny_data())

    loader = DataLoader(Stream(), batch_size=8)
    callback = FedFisherCallback(num_samples=21, max_samples=16)
    fit(tmp_path, callback, loader=loader)
    assert callback.update.num_samples == 21
    assert callback.update.header.curvature_samples == 16
    for options in ({}, {"max_samples": 8}, {"num_samples": 21, "max_samples": None}):
        with pytest.raises(ValueError, match=r"num_samples= .* max_samples="):
            fit(tmp_path, FedFisherCallback(**options), loader=loader)


def test_mistakes_in_batches_are_found_before_training(tmp_path):
    steps = []

    class Recording(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            steps.append(batch_idx)

    def no_gradient(module, batch):
        with torch.no_grad():
            return module(batch[0])

    with pytest.raises(ValueError, match="no tensor with a gradient"):
        fit(tmp_path, Recording(), FedFisherCallback(forward=no_gradient))

    class Hidden(TinyClassifier):
        def forward(self, x):
            with torch.no_grad():
                x = self.network[:5](x)
            return self.network[5:](x)

    for curvature in ("kfac", "diagonal"):
        with pytest.raises(UnsupportedModelError, match=r"network\.0: it runs without gradients"):
            fit(tmp_path, Recording(), FedFisherCallback(curvature=curvature), model=Hidden())
    assert not steps


def test_diverged_weights_are_not_sent(tmp_path):
    class Diverge(Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.network[7].bias.data[1] = float("nan")

    with pytest.raises((ValueError, UpdateError), match="not finite"):
        fit(tmp_path, Diverge(), FedFisherCallback())
    assert not list(tmp_path.rglob("*.safetensors*"))


def test_sharding_strategies_are_refused():
    class FakeTrainer:
        callbacks = ()

    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

    for strategy in (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy):
        for kind in (strategy, twin_of(strategy)):
            trainer = FakeTrainer()
            trainer.strategy = object.__new__(kind)
            with pytest.raises(ValueError, match="shards"):
                FedFisherCallback().setup(trainer, tiny_model(), "fit")


def test_a_client_of_one_class_has_curvature(tmp_path):
    data = tiny_data()
    only = torch.utils.data.TensorDataset(data.tensors[0], torch.ones(21, dtype=torch.long))
    callback = FedFisherCallback()
    fit(tmp_path, callback, loader=DataLoader(only, batch_size=8), max_epochs=20)
    assert all(block.trace() > 0 for block in callback.update.blocks.values())


@pytest.mark.parametrize("same", [True, False])
def test_a_second_client_below_the_same_root_leaves_the_firsts_update(same, tmp_path, recwarn):
    paths = []
    for seed in (0, 0 if same else 1):
        callback = FedFisherCallback()
        fit(tmp_path, callback, loader=tiny_loader(seed, shuffle=False))
        paths.append(callback.path)
        assert ClientUpdate.open(callback.path).digest == callback.update.digest
    assert (paths[0] == paths[1]) == same
    told = [w for w in recwarn if "holds another update" in str(w.message)]
    assert len(told) == (not same)


def test_a_file_that_the_user_named_is_written_again(tmp_path, recwarn):
    for seed in (0, 1):
        callback = FedFisherCallback(tmp_path / "u.safetensors")
        fit(tmp_path, callback, loader=tiny_loader(seed))
        assert callback.path == tmp_path / "u.safetensors"
    assert not [w for w in recwarn if "holds another update" in str(w.message)]


@pytest.mark.parametrize("head", [False, True])
def test_an_output_that_cannot_be_written_is_refused_before_the_training(head, tmp_path):
    class Watched(type(tiny_model())):
        began = False

        def training_step(self, batch, batch_idx):
            self.began = True
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.began = True

        def predict_step(self, batch, batch_idx):
            self.began = True

    (tmp_path / "runs").write_text("a file")
    (tmp_path / "fedfisher").write_text("a file")
    for output in (tmp_path / "runs/u.safetensors", Path("/proc/none/u.safetensors"), None):
        model = Watched()
        callback = FedFisherCallback(output, closed_form_head=head)
        trainer = quiet_trainer(tmp_path, callbacks=[callback])
        for run in (trainer.fit, *((trainer.validate, trainer.predict) if head else ())):
            with pytest.raises(OSError, match="cannot be written"):
                run(model, tiny_loader())
            assert not model.began
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "fedfisher"}
    fit(tmp_path, FedFisherCallback(tmp_path / "runs/u.safetensors"), fast_dev_run=True)
