"""Less work for tests whose assertions do not depend on how much is done."""

import dataclasses

import pytest
from simulation.data import load_images

from lightning_fedfisher.merge.methods import METHODS


@pytest.fixture(scope="module")
def few_published_steps():
    """The published servers take 20 steps instead of 2000, and look at the model twice."""
    with pytest.MonkeyPatch.context() as patch:
        for name, method in METHODS.items():
            if method.keeps_best:
                quick = dataclasses.replace(method, max_iterations=20, steps_per_epoch=10)
                patch.setitem(METHODS, name, quick)
        yield


@pytest.fixture
def few_digits(monkeypatch):
    """Studies train and test on a third of the digits."""

    def load(dataset, data_dir=None):
        images = load_images(dataset, data_dir)
        few = images.train.subset(range(600)), images.test.subset(range(120))
        return dataclasses.replace(images, train=few[0], test=few[1])

    monkeypatch.setattr("simulation.study.load_images", load)
