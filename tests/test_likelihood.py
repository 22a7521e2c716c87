"""Residual directions against the definitions of the Fisher types in logit space."""

import math

import numpy as np
import pytest
import torch

from lightning_fedfisher.likelihood import FISHER_TYPES, residual_directions

CLASSES = 4


def _logits(samples=6, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(samples, CLASSES, generator=generator, dtype=dtype)


def _labels(samples=6):
    return torch.arange(samples) % CLASSES


def _uniforms(samples=6, draws=3):
    return torch.from_numpy(np.random.default_rng(0).random((samples, draws)))


def _second_moment(directions):
    return torch.einsum("nsc,nsd->scd", directions, directions)


def _reference_fisher(logits):
    """``diag(p) - p p'`` of each sample, with ``1 - p`` summed from the other classes."""
    p = torch.softmax(logits.double(), dim=1)
    others = torch.stack([p[:, torch.arange(CLASSES) != c].sum(1) for c in range(CLASSES)], dim=1)
    fisher = -p.unsqueeze(2) * p.unsqueeze(1)
    fisher[:, range(CLASSES), range(CLASSES)] = p * others
    return fisher


def _reference_unit_residual(logits, y):
    """``e_y - q``, with ``q`` the softmax over the wrong classes alone, at unit length.

    ``e_y - p = (1 - p_y) (e_y - q)`` at any logits, so this is the direction and its limit.
    """
    wrong = [c for c in range(len(logits)) if c != y]
    top = max(logits[c] for c in wrong)
    weights = [math.exp(logits[c] - top) for c in wrong]
    direction = [0.0] * len(logits)
    direction[y] = 1.0
    for c, weight in zip(wrong, weights, strict=True):
        direction[c] = -weight / math.fsum(weights)
    length = math.sqrt(math.fsum(v * v for v in direction))
    return torch.tensor([v / length for v in direction], dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_exact_is_the_covariance_of_the_label(scale):
    logits = _logits(scale=scale)
    directions = residual_directions(logits, None, "exact")
    torch.testing.assert_close(
        _second_moment(directions), _reference_fisher(logits), rtol=0, atol=1e-14
    )


def test_empirical_is_label_minus_probability():
    logits, labels = _logits(), _labels()
    expected = torch.nn.functional.one_hot(labels, CLASSES) - torch.softmax(logits, dim=1)
    directions = residual_directions(logits, labels, "empirical")
    torch.testing.assert_close(directions, expected.unsqueeze(0), rtol=0, atol=1e-14)


def test_empirical_is_minus_the_gradient_of_the_loss():
    logits, labels = _logits().requires_grad_(), _labels()
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    torch.testing.assert_close(
        residual_directions(logits, labels, "empirical")[0], -logits.grad, rtol=0, atol=1e-14
    )


def test_exact_is_the_expectation_of_empirical_over_labels():
    logits = _logits()
    p = torch.softmax(logits, dim=1)
    expectation = sum(
        p[:, c, None, None]
        * _second_moment(residual_directions(logits, torch.full((6,), c), "empirical"))
        for c in range(CLASSES)
    )
    exact = _second_moment(residual_directions(logits, None, "exact"))
    torch.testing.assert_close(exact, expectation, rtol=0, atol=1e-14)


def test_mc_equals_exact_on_a_grid_that_fits_the_probabilities():
    logits = torch.tensor([[1 / 2, 1 / 8, 1 / 4, 1 / 8]], dtype=torch.float64).log()
    grid = ((torch.arange(16, dtype=torch.float64) + 0.5) / 16).unsqueeze(0)
    mc = _second_moment(residual_directions(logits, None, "mc", grid))
    torch.testing.assert_close(mc, _reference_fisher(logits), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("draws", "tolerance"),
    [
        # On a grid each class is drawn to within one of its share.
        (lambda n: ((torch.arange(n, dtype=torch.float64) + 0.5) / n).expand(6, n), CLASSES / 4000),
        # At random the share has a standard deviation below 1 / (2 sqrt(n)).
        (lambda n: _uniforms(6, n), 5 / (2 * math.sqrt(4000))),
    ],
    ids=["grid", "seeded"],
)
def test_mc_converges_to_exact(draws, tolerance):
    logits = _logits()
    mc = _second_moment(residual_directions(logits, None, "mc", draws(4000)))
    assert (mc - _reference_fisher(logits)).abs().max() < tolerance


def test_mc_draws_by_the_inverse_of_the_distribution():
    logits = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()
    uniforms = torch.tensor([[0.1, 0.3, 0.7, 0.8, 0.999]], dtype=torch.float64)
    directions = residual_directions(logits, None, "mc", uniforms)[:, 0]
    assert directions.argmax(dim=1).tolist() == [0, 1, 1, 2, 2]
    expected = (torch.eye(3, dtype=torch.float64)[1] - logits.exp()[0]) / math.sqrt(5)
    torch.testing.assert_close(directions[1], expected, rtol=0, atol=1e-15)


def test_mc_never_draws_an_impossible_class():
    logits = torch.tensor([[-2000.0, 0.0, 0.0]])
    directions = residual_directions(logits, None, "mc", torch.zeros(1, 1))
    assert directions[0, 0, 0] == 0


def test_normalised_has_unit_length_and_the_direction_of_empirical():
    logits, labels = _logits(), _labels()
    normalised = residual_directions(logits, labels, "normalised")[0]
    empirical = residual_directions(logits, labels, "empirical")[0]
    torch.testing.assert_close(
        normalised.norm(dim=1), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-14
    )
    expected = empirical / empirical.norm(dim=1, keepdim=True)
    torch.testing.assert_close(normalised, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shift", [-30.0, -1.0, 0.5, 30.0, 800.0])
def test_normalised_ignores_what_only_rescales_the_residual(shift):
    logits, labels = _logits(), _labels()
    expected = residual_directions(logits, labels, "normalised")
    for moved in (
        logits.scatter_add(1, labels[:, None], torch.full((6, 1), shift, dtype=torch.float64)),
        logits + shift,
    ):
        directions = residual_directions(moved, labels, "normalised")
        torch.testing.assert_close(directions, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gap", [0.0, 5.0, 50.0, 200.0, 1000.0])
@pytest.mark.parametrize("label", range(CLASSES), ids="label {}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalised_reaches_its_limit_where_the_softmax_saturates(gap, label, dtype):
    logits = torch.tensor([gap + 0.1, 0.3, -1.1, 0.7], dtype=dtype)
    directions = residual_directions(logits[None], torch.tensor([label]), "normalised")
    expected = _reference_unit_residual(logits.tolist(), label)
    assert directions.dtype == dtype
    tolerance = 1e-7 if dtype == torch.float32 else 1e-12
    assert (directions[0, 0].double() - expected).abs().max() < tolerance


def test_normalised_of_a_certain_and_of_a_hopeless_two_class_sample_agree():
    logits = torch.tensor([[1000.0, 0.0], [-1000.0, 0.0]])
    directions = residual_directions(logits, torch.tensor([0, 0]), "normalised")
    expected = torch.tensor([1.0, -1.0]) / math.sqrt(2)
    torch.testing.assert_close(directions, expected.expand(1, 2, 2))


@pytest.mark.parametrize("gap", [5.0, 20.0, 50.0])
def test_small_residuals_keep_their_digits(gap):
    logits = torch.tensor([[gap + 0.1, 0.3, -1.1, 0.7]])
    top, *rest = logits[0].tolist()
    others = [math.exp(z - top) for z in rest]
    total = 1 + math.fsum(others)
    small = torch.tensor([math.fsum(others), *(-o for o in others)], dtype=torch.float64) / total
    empirical = residual_directions(logits, torch.tensor([0]), "empirical")[0, 0]
    torch.testing.assert_close(empirical.double(), small, rtol=1e-6, atol=0)
    exact = _second_moment(residual_directions(logits, None, "exact").double())
    torch.testing.assert_close(exact, _reference_fisher(logits), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gap", [200.0, 1000.0])
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_residuals_below_float32_are_zero_and_finite(gap, fisher):
    logits = torch.tensor([[gap, 0.5, -1.0, 0.25]])
    directions = residual_directions(logits, torch.tensor([0]), fisher, _uniforms(1))
    assert torch.isfinite(directions).all()
    assert _second_moment(directions).abs().max() == 0


def test_a_certain_mistake_has_the_limits_of_one_hot_vectors():
    logits = torch.tensor([[1000.0, 0.5, -1.0, 0.25]])
    empirical = residual_directions(logits, torch.tensor([2]), "empirical")
    assert empirical[0, 0].tolist() == [-1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("fisher", FISHER_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_dtype_and_detachment(fisher, dtype):
    logits = _logits(dtype=dtype).requires_grad_()
    directions = residual_directions(logits, _labels(), fisher, _uniforms())
    number = {"exact": CLASSES, "mc": 3, "empirical": 1, "normalised": 1}[fisher]
    assert directions.shape == (number, 6, CLASSES)
    assert directions.dtype == dtype
    assert not directions.requires_grad
    # A direction moves probability between classes, so its entries cancel.
    assert directions.sum(dim=2).abs().max() < 1e-6


@pytest.mark.parametrize("fisher", FISHER_TYPES)
def test_directions_belong_to_samples(fisher):
    logits, labels, uniforms = _logits(), _labels(), _uniforms()
    together = residual_directions(logits, labels, fisher, uniforms)
    for i in range(6):
        alone = residual_directions(
            logits[i : i + 1], labels[i : i + 1], fisher, uniforms[i : i + 1]
        )
        torch.testing.assert_close(together[:, i : i + 1], alone, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_integer_type(dtype):
    expected = residual_directions(_logits(), _labels(), "empirical")
    assert torch.equal(residual_directions(_logits(), _labels().to(dtype), "empirical"), expected)


@pytest.mark.parametrize("fisher", FISHER_TYPES)
@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(6), "shape \\(samples, classes\\)"),
        (torch.zeros(6, 4, 2), "shape \\(samples, classes\\)"),
        (torch.zeros(6, 1), "at least 2 classes"),
        (torch.full((6, 4), float("nan")), "not finite"),
        (torch.tensor([[0.0, math.inf, 0.0, 0.0]] * 6), "not finite"),
    ],
    ids=["one dimension", "three dimensions", "one class", "nan", "inf"],
)
def test_logits_that_no_classifier_has(fisher, logits, message):
    with pytest.raises(ValueError, match=message):
        residual_directions(logits, _labels(), fisher, _uniforms())


@pytest.mark.parametrize("fisher", ["empirical", "normalised"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "needs labels"),
        (torch.tensor([0, 1, 2, 3, 0, 4]), "lie in \\[0, 4\\), got \\[0, 4\\]"),
        (torch.tensor([0, 1, 2, 3, 0, -1]), "lie in \\[0, 4\\), got \\[-1, 3\\]"),
        (torch.zeros(6), "class indices"),
        (torch.zeros(5, dtype=torch.int64), "class indices of shape \\(6,\\)"),
        (torch.zeros(6, 4, dtype=torch.int64), "class indices of shape \\(6,\\)"),
    ],
    ids=["missing", "too large", "negative", "float", "too few", "one-hot"],
)
def test_labels_that_are_no_classes(fisher, labels, message):
    with pytest.raises(ValueError, match=message):
        residual_directions(_logits(), labels, fisher)


@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_types_that_need_no_labels_do_without(fisher):
    assert torch.isfinite(residual_directions(_logits(), None, fisher, _uniforms())).all()


def test_mc_needs_uniforms():
    with pytest.raises(ValueError, match="uniform draws"):
        residual_directions(_logits(), None, "mc")
