"""Batches get to a module as they do in training, with its hooks or without."""

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher.distributed.lightning_batches import as_in_training, without_hooks


class _Hooked(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 1]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * 10]

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _Seen(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        raw = [torch.zeros(3, 2)]
        self.batch = batch
        self.usual = as_in_training(trainer, pl_module)(raw)
        self.plain = without_hooks(trainer, pl_module)(raw)


def _seen(tmp_path, module, **options):
    seen = _Seen()
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, barebones=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=[seen], **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(torch.zeros(3, 2)), batch_size=3))
    return seen


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("64-true", torch.float64)]
)
def test_a_training_batch_is_as_the_trainer_makes_it(tmp_path, precision, dtype):
    seen = _seen(tmp_path, _Hooked(), precision=precision)
    assert seen.usual[0].dtype == seen.plain[0].dtype == seen.batch[0].dtype == dtype
    assert torch.equal(seen.usual[0], seen.batch[0])
    assert (seen.usual[0] == 10).all()
    assert not seen.plain[0].any()


def test_a_module_that_moves_batches_itself_moves_those_of_any_loader(tmp_path):
    class Moving(_Hooked):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return [batch[0] + 5]

    seen = _seen(tmp_path, Moving())
    assert (seen.usual[0] == 60).all()
    assert (seen.plain[0] == 5).all()


def test_a_data_module_that_moves_batches_comes_first(tmp_path):
    class Data(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.zeros(3, 2)), batch_size=3)

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return [batch[0] + 7]

    seen = _Seen()
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=[seen],
    )  # fmt: skip
    trainer.fit(_Hooked(), datamodule=Data())
    assert (seen.plain[0] == 7).all()
