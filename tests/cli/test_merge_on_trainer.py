import logging
import signal

import pytest
import torch

from lightning_fedfisher import MergeError, merge_updates
from lightning_fedfisher.cli.merge_on_trainer import merge_on_trainer


@pytest.fixture
def files(folder):
    return sorted(map(str, (folder / "updates").glob("*.safetensors")))


@pytest.mark.parametrize(
    "options", [{"method": "fedfisher", "max_influence": 3.0}, {"method": "fedavg"}], ids=str
)
def test_one_device_merges_as_without_a_trainer(files, options):
    found = merge_on_trainer(files, "cpu", 1, options)
    expected = merge_updates(files, **options)
    assert (found.method, found.max_influence) == (expected.method, expected.max_influence)
    assert found.clients == expected.clients
    assert found.state_dict.keys() == expected.state_dict.keys()
    for name, tensor in expected.state_dict.items():
        assert torch.equal(found.state_dict[name], tensor), name


def test_it_says_and_writes_nothing_and_leaves_the_loggers_as_they_were(files, folder, capsys):
    logger = logging.getLogger("lightning.pytorch")
    before, level = sorted(folder.rglob("*")), logger.level
    merge_on_trainer(files, "cpu", 1, {"method": "fedavg"})
    assert sorted(folder.rglob("*")) == before
    assert capsys.readouterr().out == ""
    assert logger.level == level


@pytest.mark.parametrize(
    ("accelerator", "devices", "told"), [("abacus", 1, "abacus"), ("cpu", 0, "devices")]
)
def test_devices_that_lightning_refuses_are_refused(files, accelerator, devices, told):
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    with pytest.raises(ValueError, match=told):
        merge_on_trainer(files, accelerator, devices, {})
    assert logger.level == level


def test_updates_are_refused_as_without_a_trainer(files, folder, damage):
    damage(folder / "updates/client-0.safetensors")
    with pytest.raises(MergeError, match=r"client-0\.safetensors"):
        merge_on_trainer(files, "cpu", 1, {})


@pytest.fixture
def interrupts():
    """Lets an interrupted Trainer ignore interrupts, but not the tests that follow."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupted_merge_has_no_result(files, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_fedfisher.FisherMergeModule.on_train_epoch_start", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge_on_trainer(files, "cpu", 1, {})
