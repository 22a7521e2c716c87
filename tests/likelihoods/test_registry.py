"""Every likelihood of the registry: what each must be able to do."""

import inspect
import math

import pytest
import torch
from torch.nn import functional as F

from lightning_fedfisher.extraction.extract import extract_curvature
from lightning_fedfisher.likelihoods import LIKELIHOODS, Gaussian, Likelihood

every_likelihood = pytest.mark.parametrize("name", LIKELIHOODS)
# One observation and several; the categorical has three classes.
SHAPES = {
    "categorical": [(6, 3), (6, 3, 4), (6, 3, 2, 2)],
    "bernoulli": [(6,), (6, 1), (6, 3), (6, 2, 2)],
    "gaussian": [(6,), (6, 1), (6, 3), (6, 2, 2)],
}
CASES = [(name, shape) for name, shapes in SHAPES.items() for shape in shapes]


def batch(name, shape):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    if name == "categorical":
        return logits, torch.randint(0, 3, (shape[0], *shape[2:]), generator=generator)
    if name == "bernoulli":
        return logits, torch.randint(0, 2, shape, generator=generator).double()
    return logits, torch.randn(shape, generator=generator, dtype=torch.float64)


def test_the_registry_holds_each_class_under_its_own_name():
    assert SHAPES.keys() == LIKELIHOODS.keys()
    for name, likelihood in LIKELIHOODS.items():
        assert issubclass(likelihood, Likelihood)
        assert not inspect.isabstract(likelihood)
        assert likelihood.name == name
    assert [name for name, found in LIKELIHOODS.items() if found.softmax] == ["categorical"]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_nll_is_that_of_torch_summed_over_each_sample(name, shape):
    logits, labels = batch(name, shape)
    torch_nll = {
        "categorical": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
        "bernoulli": lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="sum"),
        "gaussian": lambda z, y: F.gaussian_nll_loss(
            z, y, torch.ones_like(z), full=True, reduction="sum"
        ),
    }[name]
    expected = [torch_nll(logits[i : i + 1], labels[i : i + 1]) for i in range(len(logits))]
    found = LIKELIHOODS[name].nll(logits, labels)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_the_residual_is_minus_the_gradient_of_the_nll(name, shape):
    logits, labels = batch(name, shape)
    residual = LIKELIHOODS[name](logits, labels).residual()
    logits.requires_grad_()
    LIKELIHOODS[name].nll(logits, labels).sum().backward()
    torch.testing.assert_close(residual, -logits.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_the_nll_of_every_label_is_a_probability(name, shape):
    """Summed or integrated over all labels of one observation, the likelihood is 1."""
    logits, _ = batch(name, shape)
    one = logits.reshape(len(logits), 3, -1)[:1, :, 0] if name == "categorical" else logits[:1]
    one = one if name == "categorical" else one.reshape(1, -1)[:, :1]
    if name == "gaussian":
        grid = torch.linspace(-12, 12, 4801, dtype=torch.float64).unsqueeze(1) + one
        density = torch.exp(-Gaussian.nll(one.expand_as(grid), grid))
        total = torch.trapezoid(density, grid.squeeze(1))
    else:
        every = torch.arange(3) if name == "categorical" else torch.tensor([[0.0], [1.0]])
        z = one.expand(len(every), -1)
        total = torch.exp(-LIKELIHOODS[name].nll(z, every)).sum()
    assert float(total) == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_accuracy_is_the_share_of_observations_that_are_right(name, shape):
    logits, labels = batch(name, shape)
    found = LIKELIHOODS[name].accuracy(logits, labels)
    if name == "gaussian":
        assert found is None
        return
    predicted = logits.argmax(1) if name == "categorical" else (logits > 0).double()
    expected = (predicted == labels).double().reshape(len(logits), -1).mean(1)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    assert 0 < float(found.mean()) < 1


@every_likelihood
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_accuracy_in_low_precision_is_in_float32(name, dtype):
    logits, labels = batch(name, SHAPES[name][-1])
    found = LIKELIHOODS[name].accuracy(logits.to(dtype), labels)
    assert found is None or found.dtype == torch.float32


@every_likelihood
def test_scores_refuse_labels_that_do_not_fit(name):
    logits, labels = batch(name, SHAPES[name][-1])
    likelihood = LIKELIHOODS[name]
    with pytest.raises(ValueError, match="labels must"):
        likelihood.nll(logits, labels[:-1])
    if likelihood.accuracy(logits, labels) is not None:
        with pytest.raises(ValueError, match="labels must"):
            likelihood.accuracy(logits, labels[:-1])


@every_likelihood
def test_logits_that_are_none(name):
    for logits, message in (
        (torch.zeros(0, 4), "holds no samples"),
        (torch.full((6, 4), math.nan), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            LIKELIHOODS[name].check_logits(logits)


@every_likelihood
def test_the_header_keeps_an_output_layer_only_of_a_softmax(name):
    logits, labels = batch(name, (6, 3))
    model = torch.nn.Linear(3, 3).double()
    found = extract_curvature(model, [(logits, labels)], likelihood=name, progress=False)
    assert found.output_layer == "weight"
    assert found.header(6).output_layer == ("weight" if LIKELIHOODS[name].softmax else "")
    assert found.header(6).likelihood == name


def test_a_new_likelihood_needs_nothing_but_its_row(monkeypatch):
    class Halved(Gaussian):
        name = "halved"

        def residual(self):
            return super().residual() / 2

    monkeypatch.setitem(LIKELIHOODS, "halved", Halved)
    logits, labels = batch("gaussian", (6, 3))
    model = torch.nn.Linear(3, 3).double()
    whole, half = (
        extract_curvature(
            model, [(logits, labels)], "diagonal", fisher="empirical", likelihood=name
        )
        for name in ("gaussian", "halved")
    )
    torch.testing.assert_close(half.blocks["weight"].values * 4, whole.blocks["weight"].values)
    with pytest.raises(ValueError, match="categorical, bernoulli, gaussian, halved"):
        extract_curvature(model, [(logits, labels)], likelihood="poisson")
