"""What the losses that a module holds say, taken over or refused by name."""

import pytest
import torch
from torch import nn

from lightning_fedfisher import UnsupportedModelError, extract_curvature
from lightning_fedfisher.extraction.held_losses import options_by_losses
from lightning_fedfisher.extraction.options import ExtractionOptions


def _options(losses, **options):
    model = nn.ModuleDict({"net": nn.Linear(4, 3), **losses})
    return options_by_losses(model, ExtractionOptions(**options))


def _refused(losses, **options):
    with pytest.raises(UnsupportedModelError) as caught:
        _options(losses, **options)
    return caught.value.offenders


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.NLLLoss])
def test_the_label_that_a_loss_ignores_is_taken_over(loss):
    assert _options({"loss": loss(ignore_index=255)}).ignore_index == 255
    assert _options({"loss": loss(ignore_index=0)}).ignore_index == 0
    assert _options({"loss": loss()}).ignore_index is None
    # What the user says comes first, also between two losses that say different things.
    two = {"a": loss(ignore_index=1), "b": loss(ignore_index=2)}
    assert _options(two, ignore_index=7).ignore_index == 7
    (told,) = _refused(two)
    assert "a: 1, b: 2" in told


@pytest.mark.parametrize(
    ("loss", "likelihood"),
    [
        (nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1), "categorical"),
        (nn.NLLLoss(), "categorical"),
        (nn.BCEWithLogitsLoss(), "bernoulli"),
        (nn.MultiLabelSoftMarginLoss(), "bernoulli"),
        (nn.MSELoss(reduction="none"), "gaussian"),
    ],
)
def test_a_loss_of_the_likelihood_changes_nothing(loss, likelihood):
    options = ExtractionOptions(likelihood=likelihood)
    assert _options({"loss": loss}, likelihood=likelihood) == options


@pytest.mark.parametrize(
    ("loss", "likelihood"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(3)), "categorical"),
        (nn.NLLLoss(weight=torch.ones(3)), "categorical"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), "bernoulli"),
        (nn.MultiLabelSoftMarginLoss(weight=torch.ones(3)), "bernoulli"),
    ],
)
def test_class_weights_are_refused_by_the_name_of_their_loss(loss, likelihood):
    (told,) = _refused({"loss": loss}, likelihood=likelihood)
    assert f"loss is a {type(loss).__name__} with" in told
    assert "class weights" in told


def test_a_loss_of_another_likelihood_is_refused_unless_one_fits_or_the_user_says_what_is_meant():
    for loss, likelihood in ((nn.MSELoss(), "categorical"), (nn.CrossEntropyLoss(), "gaussian")):
        (told,) = _refused({"loss": loss}, likelihood=likelihood)
        assert type(loss).__name__ in told
        assert "pass likelihood=" in told
        assert _options({"loss": loss}, likelihood=likelihood, forward=lambda m, b: m(b))
    assert _options({"main": nn.CrossEntropyLoss(), "mask": nn.BCELoss(), "box": nn.L1Loss()})
    (told,) = _refused({"loss": nn.PoissonNLLLoss()}, likelihood="gaussian")
    assert "PoissonNLLLoss, which goes with no likelihood" in told


def test_a_loss_of_probabilities_is_refused_with_the_way_out():
    (told,) = _refused({"loss": nn.BCELoss()}, likelihood="bernoulli")
    assert "loss is a BCELoss, which takes probabilities" in told
    assert "forward=" in told


def test_the_empirical_fisher_is_not_that_of_smoothed_labels():
    smoothed = {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}
    (told,) = _refused(smoothed, fisher="empirical")
    assert "label_smoothing" in told
    for fisher in ("normalised", "exact", "mc"):
        assert _options(smoothed, fisher=fisher)


def test_all_that_is_wrong_is_named_at_once():
    losses = {
        "a": nn.CrossEntropyLoss(weight=torch.ones(3), ignore_index=1, label_smoothing=0.1),
        "b": nn.NLLLoss(ignore_index=2),
    }
    assert len(_refused(losses, fisher="empirical")) == 3


@pytest.mark.parametrize(
    ("make", "likelihood", "word"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), "categorical", "softmax"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()), "bernoulli", "sigmoid"),
        (
            lambda: nn.Sequential(nn.Linear(4, 1), nn.Sigmoid(), nn.Flatten(0)),
            "bernoulli",
            "sigmoid",
        ),
    ],
)
def test_a_model_that_ends_in_probabilities_is_refused_unless_the_user_says_they_are_meant(
    make, likelihood, word
):
    model, x = make(), torch.randn(6, 4)
    labels = torch.arange(6) % 3 if likelihood == "categorical" else (model(x) > 0.5).float()
    data = [(x, labels)]
    with pytest.raises(UnsupportedModelError, match=rf"a {word}.*forward="):
        extract_curvature(model, data, likelihood=likelihood, progress=False)
    meant = lambda module, batch: (module(batch[0]), batch[1])  # noqa: E731
    assert extract_curvature(model, data, likelihood=likelihood, forward=meant, progress=False)
    assert extract_curvature(model, [(x, model(x).detach())], likelihood="gaussian", progress=False)


def test_log_probabilities_are_logits():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 3))
    data = [(torch.randn(6, 4), torch.arange(6) % 3)]
    found, expected = (
        extract_curvature(model, data, fisher="exact", tolerance=0.0, progress=False)
        for model in (nn.Sequential(plain[0], nn.LogSoftmax(1)), plain)
    )
    torch.testing.assert_close(found.blocks["0"].diagonal(), expected.blocks["0"].diagonal())
