"""Every logged key is spelled in one module: what is really logged is compared with it."""

import ast
import re
import sys
from pathlib import Path

import pytest
from helpers.federation import quiet_trainer, tiny_loader, tiny_model
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from lightning_fedfisher import FedFisherCallback, FisherMergeModule
from lightning_fedfisher.tracking import logged_keys as keys

NAMES = {value for name, value in vars(keys).items() if name.isupper()}


class Keys(DummyLogger):
    """Remembers the keys that it is told."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def log_metrics(self, metrics, step=None):
        self.seen |= set(metrics)


def _name(key):
    """The name in a key, without a client's prefix and without what it is told of."""
    return key.removeprefix(f"{keys.CLIENT_PREFIX}/").partition("/")[0]


def test_whatever_is_logged_has_its_name_here(tmp_path):
    client, server = Keys(), Keys()
    callback = FedFisherCallback(tmp_path / "update.safetensors")
    quiet_trainer(tmp_path, callbacks=[callback], logger=client).fit(tiny_model(), tiny_loader())
    model = tiny_model()
    merge = FisherMergeModule([callback.path] * 2, model=model)
    samples = list(tiny_loader().dataset)
    trainer = quiet_trainer(tmp_path, max_epochs=-1, logger=server, limit_val_batches=1)
    trainer.fit(merge, val_dataloaders=DataLoader(samples, batch_size=7))
    for logger, names in (
        (
            client,
            {
                *(
                    keys.EXTRACTION_SECONDS,
                    keys.CURVATURE_SAMPLES,
                    keys.UPLOAD_BYTES,
                ),
                *(keys.TRACE, keys.EFFECTIVE_RANK),
            },
        ),
        (
            server,
            {
                *(
                    keys.ITERATIONS,
                    keys.OBJECTIVE,
                    keys.RESIDUAL,
                    keys.EPOCH,
                ),
                *(
                    keys.DISTANCE,
                    keys.INFLUENCE,
                    keys.VAL_ACCURACY,
                    keys.VAL_NLL,
                ),
            },
        ),
    ):
        found = {_name(key) for key in logger.seen}
        assert names <= found <= NAMES


def test_names_are_told_apart():
    names = [value for name, value in vars(keys).items() if name.isupper()]
    assert len(set(names)) == len(names)


def test_names_come_with_nothing_else():
    tree = ast.parse(Path(keys.__file__).read_text())
    imported = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    imported += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    assert set(imported) <= {"__future__", *sys.stdlib_module_names}


def test_keys_are_spelled_nowhere_else_in_this_room():
    for path in Path(keys.__file__).parent.glob("*.py"):
        if path.name != "logged_keys.py":
            strings = [
                node.value
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
            slashed = {name for name in NAMES if "/" in name}
            assert slashed.isdisjoint(strings), path.name


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        (
            keys.exactly(keys.RESIDUAL),
            ["residual"],
            ["residual/a", "val_residual", "residuals"],
        ),
        (
            keys.of_each(keys.RESIDUAL),
            ["residual/a", "residual/a/b"],
            ["residual", "residual/"],
        ),
        (
            keys.of_each_layer_of_clients(keys.TRACE),
            ["fedfisher/trace/a", "fedfisher/kfac-mc/trace/a/b"],
            ["fedfisher/trace", "trace/a", "xfedfisher/trace/a", "fedfisher/a/b/trace/c"],
        ),
        (
            keys.LOSS_PATTERN,
            ["loss", "train_loss", "val/loss", "train_loss_epoch"],
            ["test/loss", "losses", "train_loss_step"],
        ),
    ],
)
def test_patterns_match_their_keys_alone(pattern, matches, others):
    assert [key for key in [*matches, *others] if re.search(pattern, key)] == matches
