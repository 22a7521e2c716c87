"""LightningCLI: the callback and all its options from a YAML file."""

import sys

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from lightning_fedfisher import ClientUpdate

SOURCE = """
from helpers.federation import TinyClassifier, tiny_loader
from lightning.pytorch import LightningDataModule
from torch import Tensor

class Data(LightningDataModule):
    def train_dataloader(self):
        return tiny_loader()

def plain(module, batch):
    return module(batch[0]), batch[1]

def annotated(module, batch) -> tuple[Tensor, Tensor]:
    return module(batch[0]), batch[1]

def logits(module, batch) -> Tensor:
    return module(batch[0])

class Scaled:
    def __init__(self, factor: float = 1.0):
        self.factor = factor

    def __call__(self, module, batch):
        return self.factor * module(batch[0]), batch[1]
"""
CONFIG = """
seed_everything: false
model: {{class_path: cli_parts.TinyClassifier}}
data: {{class_path: cli_parts.Data}}
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  default_root_dir: {root}
  callbacks:
    - class_path: lightning_fedfisher.FedFisherCallback
      init_args:
        output: {root}/update.safetensors
        curvature: ekfac
        fisher: exact
        max_samples: auto
        upload_budget: null
        metadata: {{site: b}}
        {forward}
"""
FUNCTIONS = [
    "",
    "forward: null",
    "forward: cli_parts.plain",
    "forward: cli_parts.annotated",
    "forward: cli_parts.logits",
    "forward: cli_parts.Scaled",
    "forward: {class_path: cli_parts.Scaled, init_args: {factor: 1.0}}",
]


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Fits as a command line does, and opens the update."""
    (tmp_path / "cli_parts.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cli_parts", raising=False)

    def run(forward, *flags):
        config = tmp_path / "config.yaml"
        config.write_text(CONFIG.format(root=tmp_path, forward=forward))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            LightningCLI(
                args=["fit", "--config", str(config), *flags],
                save_config_kwargs={"overwrite": True},
            )
        return ClientUpdate.open(tmp_path / "update.safetensors")

    return run


@pytest.mark.parametrize("forward", FUNCTIONS)
def test_a_function_is_taken_by_its_path_annotated_or_not(forward, fit):
    header = fit(forward).header
    assert (header.curvature, header.fisher) == ("ekfac", "exact")
    assert header.metadata == {"site": "b"}


def test_the_function_that_is_named_runs(fit):
    halved = "forward: {class_path: cli_parts.Scaled, init_args: {factor: 0.5}}"
    traces = [
        sum(block.trace() for block in fit(forward).blocks.values())
        for forward in ("forward: cli_parts.plain", halved)
    ]
    assert traces[1] < 0.5 * traces[0]


def test_options_of_a_file_are_overridden_by_flags(fit):
    header = fit("", "--trainer.callbacks.max_samples=10").header
    assert header.curvature_samples == 10
    assert header.curvature == "ekfac"


def test_what_is_no_function_is_refused(fit, capsys):
    with pytest.raises(SystemExit):
        fit("forward: cli_parts.nothing")
    assert "cli_parts" in capsys.readouterr().err
