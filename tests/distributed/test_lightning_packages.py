"""Lightning's classes are told in both of its packages."""

import subprocess
import sys

import pytest
from helpers.twins import twin_of
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging

from lightning_fedfisher.distributed.lightning_packages import is_lightnings


def test_both_packages_classes_are_told_and_those_derived_from_them():
    twin = twin_of(WeightAveraging)
    derived = type("Mine", (twin,), {})
    for value in (EMAWeightAveraging(), twin(), derived()):
        assert is_lightnings(value, "StochasticWeightAveraging", "WeightAveraging")
        assert not is_lightnings(value, "StochasticWeightAveraging")
    assert not is_lightnings(ModelCheckpoint(), "WeightAveraging")


@pytest.mark.parametrize("module", ["mine.lightning", "lightning_bolts.callbacks", "__main__"])
def test_a_class_of_the_same_name_is_not_lightnings(module):
    mine = type("WeightAveraging", (), {"__module__": module})
    assert not is_lightnings(mine(), "WeightAveraging")


def test_no_package_is_imported_for_it():
    code = (
        "import sys; from lightning_fedfisher.distributed.lightning_packages import is_lightnings; "
        "assert not is_lightnings(1, 'int'); "
        "assert not {'lightning', 'pytorch_lightning'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
