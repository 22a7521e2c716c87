"""Residual directions against the definitions of the Fisher types in logit space."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_fedfisher.extraction.fisher_types import FISHER_TYPES, residual_directions
from lightning_fedfisher.likelihoods import IGNORE_INDEX, LIKELIHOODS

CLASSES = 4


def _logits(samples=6, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(samples, CLASSES, generator=generator, dtype=dtype)


def _labels(samples=6):
    return torch.arange(samples) % CLASSES


def _uniforms(samples=6, draws=3):
    return torch.from_numpy(np.random.default_rng(0).random((samples, draws)))


def _directions(logits, labels, fisher, uniforms=None, likelihood="categorical", tolerance=0.0):
    """Residual directions with as many draws as the uniforms suffice for."""
    if uniforms is None:
        return residual_directions(logits, labels, fisher, likelihood, tolerance=tolerance)
    observations = logits[0].numel()
    if likelihood == "categorical":
        observations //= max(logits.shape[1:2] or (1,))

    def draw(n):
        assert n == uniforms.shape[1]
        return uniforms

    draws = uniforms.shape[1] // max(observations, 1)
    return residual_directions(logits, labels, fisher, likelihood, draw=draw, draws=draws)


def _all(directions):
    """Every direction of every sample, ``(directions, samples, *logits.shape[1:])``."""
    return torch.stack(directions.of(torch.arange(len(directions.first))))


def _second_moment(directions):
    """Of each sample, ``(samples, logits, logits)``."""
    rows = torch.cat([torch.arange(len(directions.first)), directions.rows])
    further = directions.further(torch.arange(len(directions.rows)))
    flat = torch.cat([directions.first, further]).reshape(len(rows), -1).double()
    outer = flat.unsqueeze(2) * flat.unsqueeze(1)
    size = flat.shape[1]
    return outer.new_zeros(len(directions.first), size, size).index_add_(0, rows, outer)


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
    directions = _directions(logits, None, "exact")
    torch.testing.assert_close(
        _second_moment(directions), _reference_fisher(logits), rtol=0, atol=1e-14
    )


def test_empirical_is_label_minus_probability():
    logits, labels = _logits(), _labels()
    expected = F.one_hot(labels, CLASSES) - torch.softmax(logits, dim=1)
    directions = _directions(logits, labels, "empirical")
    torch.testing.assert_close(_all(directions), expected.unsqueeze(0), rtol=0, atol=1e-14)


def test_empirical_is_minus_the_gradient_of_the_loss():
    logits, labels = _logits().requires_grad_(), _labels()
    F.cross_entropy(logits, labels, reduction="sum").backward()
    torch.testing.assert_close(
        _directions(logits, labels, "empirical").first, -logits.grad, rtol=0, atol=1e-14
    )


def test_exact_is_the_expectation_of_empirical_over_labels():
    logits = _logits()
    p = torch.softmax(logits, dim=1)
    expectation = sum(
        p[:, c, None, None] * _second_moment(_directions(logits, torch.full((6,), c), "empirical"))
        for c in range(CLASSES)
    )
    exact = _second_moment(_directions(logits, None, "exact"))
    torch.testing.assert_close(exact, expectation, rtol=0, atol=1e-14)


def test_mc_equals_exact_on_a_grid_that_fits_the_probabilities():
    logits = torch.tensor([[1 / 2, 1 / 8, 1 / 4, 1 / 8]], dtype=torch.float64).log()
    grid = ((torch.arange(16, dtype=torch.float64) + 0.5) / 16).unsqueeze(0)
    mc = _second_moment(_directions(logits, None, "mc", grid))
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
    mc = _second_moment(_directions(logits, None, "mc", draws(4000)))
    assert (mc - _reference_fisher(logits)).abs().max() < tolerance


def test_mc_draws_by_the_inverse_of_the_distribution():
    logits = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()
    uniforms = torch.tensor([[0.1, 0.3, 0.7, 0.8, 0.999]], dtype=torch.float64)
    alone = [_directions(logits, None, "mc", u.view(1, 1)).first[0] for u in uniforms[0]]
    assert [int(direction.argmax()) for direction in alone] == [0, 1, 1, 2, 2]
    residuals = torch.eye(3, dtype=torch.float64) - logits.exp()
    torch.testing.assert_close(alone[1], residuals[1], rtol=0, atol=1e-15)
    # Equal draws are one direction.
    together = _directions(logits, None, "mc", uniforms)
    assert together.counts.tolist() == [3]
    shares = torch.tensor([1 / 5, 2 / 5, 2 / 5], dtype=torch.float64)
    expected = torch.einsum("n,nc,nd->cd", shares, residuals, residuals)
    torch.testing.assert_close(_second_moment(together)[0], expected, rtol=0, atol=1e-15)


def test_mc_never_draws_an_impossible_class():
    logits = torch.tensor([[-2000.0, 0.0, 0.0]])
    directions = _directions(logits, None, "mc", torch.zeros(1, 1))
    assert directions.first[0, 0] == 0


def test_normalised_has_unit_length_and_the_direction_of_empirical():
    logits, labels = _logits(), _labels()
    normalised = _directions(logits, labels, "normalised").first
    empirical = _directions(logits, labels, "empirical").first
    torch.testing.assert_close(
        normalised.norm(dim=1), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-14
    )
    expected = empirical / empirical.norm(dim=1, keepdim=True)
    torch.testing.assert_close(normalised, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shift", [-30.0, -1.0, 0.5, 30.0, 800.0])
def test_normalised_ignores_what_only_rescales_the_residual(shift):
    logits, labels = _logits(), _labels()
    expected = _directions(logits, labels, "normalised").first
    for moved in (
        logits.scatter_add(1, labels[:, None], torch.full((6, 1), shift, dtype=torch.float64)),
        logits + shift,
    ):
        directions = _directions(moved, labels, "normalised")
        torch.testing.assert_close(directions.first, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gap", [0.0, 5.0, 50.0, 200.0, 1000.0])
@pytest.mark.parametrize("label", range(CLASSES), ids="label {}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalised_reaches_its_limit_where_the_softmax_saturates(gap, label, dtype):
    logits = torch.tensor([gap + 0.1, 0.3, -1.1, 0.7], dtype=dtype)
    direction = _directions(logits[None], torch.tensor([label]), "normalised").first[0]
    expected = _reference_unit_residual(logits.tolist(), label)
    assert direction.dtype == dtype
    tolerance = 1e-7 if dtype == torch.float32 else 1e-12
    assert (direction.double() - expected).abs().max() < tolerance


def test_normalised_of_a_certain_and_of_a_hopeless_two_class_sample_agree():
    logits = torch.tensor([[1000.0, 0.0], [-1000.0, 0.0]])
    directions = _directions(logits, torch.tensor([0, 0]), "normalised")
    expected = torch.tensor([1.0, -1.0]) / math.sqrt(2)
    torch.testing.assert_close(directions.first, expected.expand(2, 2))


@pytest.mark.parametrize("gap", [5.0, 20.0, 50.0])
def test_small_residuals_keep_their_digits(gap):
    logits = torch.tensor([[gap + 0.1, 0.3, -1.1, 0.7]])
    top, *rest = logits[0].tolist()
    others = [math.exp(z - top) for z in rest]
    total = 1 + math.fsum(others)
    small = torch.tensor([math.fsum(others), *(-o for o in others)], dtype=torch.float64) / total
    empirical = _directions(logits, torch.tensor([0]), "empirical").first[0]
    torch.testing.assert_close(empirical.double(), small, rtol=1e-6, atol=0)
    exact, expected = _second_moment(_directions(logits, None, "exact")), _reference_fisher(logits)
    rounding = 1e-16 * float(expected.max())
    torch.testing.assert_close(exact, expected, rtol=1e-6, atol=rounding)


@pytest.mark.parametrize("gap", [200.0, 1000.0])
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_residuals_below_float32_are_zero_and_finite(gap, fisher):
    logits = torch.tensor([[gap, 0.5, -1.0, 0.25]])
    directions = _directions(logits, torch.tensor([0]), fisher, _uniforms(1))
    assert torch.isfinite(_all(directions)).all()
    assert _second_moment(directions).float().abs().max() == 0


def test_a_certain_mistake_has_the_limits_of_one_hot_vectors():
    logits = torch.tensor([[1000.0, 0.5, -1.0, 0.25]])
    empirical = _directions(logits, torch.tensor([2]), "empirical")
    assert empirical.first[0].tolist() == [-1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("fisher", FISHER_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_dtype_and_detachment(fisher, dtype):
    logits = _logits(dtype=dtype).requires_grad_()
    directions = _directions(logits, _labels(), fisher, _uniforms())
    most = {"exact": CLASSES, "mc": 3, "empirical": 1, "normalised": 1}[fisher]
    found = _all(directions)
    assert found.shape == (int(directions.counts.max()), 6, CLASSES)
    assert len(found) <= most if fisher == "mc" else len(found) == most
    assert found.dtype == dtype
    assert not found.requires_grad
    # A direction moves probability between classes, so its entries cancel.
    assert found.sum(dim=2).abs().max() < 1e-6


@pytest.mark.parametrize("fisher", FISHER_TYPES)
def test_directions_belong_to_samples(fisher):
    logits, labels, uniforms = _logits(), _labels(), _uniforms()
    together = _second_moment(_directions(logits, labels, fisher, uniforms))
    for i in range(6):
        alone = _directions(logits[i : i + 1], labels[i : i + 1], fisher, uniforms[i : i + 1])
        torch.testing.assert_close(together[i], _second_moment(alone)[0], rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_integer_type(dtype):
    expected = _directions(_logits(), _labels(), "empirical").first
    found = _directions(_logits(), _labels().to(dtype), "empirical").first
    assert torch.equal(found, expected)


@pytest.mark.parametrize("fisher", FISHER_TYPES)
@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(6), "shape \\(samples, classes, \\*positions\\)"),
        (torch.zeros(6, 1), "at least 2 classes"),
        (torch.zeros(0, 4), "holds no samples"),
        (torch.full((6, 4), float("nan")), "not finite"),
        (torch.tensor([[0.0, math.inf, 0.0, 0.0]] * 6), "not finite"),
    ],
    ids=["one dimension", "one class", "no samples", "nan", "inf"],
)
def test_logits_that_no_classifier_has(fisher, logits, message):
    with pytest.raises(ValueError, match=message):
        residual_directions(logits, _labels(), fisher, draw=lambda n: _uniforms(draws=n))


@pytest.mark.parametrize("fisher", ["empirical", "normalised"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "needs labels"),
        (torch.tensor([0, 1, 2, 3, 0, 4]), "lie in \\[0, 4\\), got \\[0, 4\\]"),
        (torch.tensor([0, 1, 2, 3, 0, -1]), "lie in \\[0, 4\\), got \\[-1, 3\\]"),
        (torch.full((6,), 0.5), "class indices"),
        (torch.zeros(5, dtype=torch.int64), "class indices of shape \\(6,\\)"),
        (torch.zeros(6, 4, dtype=torch.int64), "class indices of shape \\(6,\\)"),
    ],
    ids=["missing", "too large", "negative", "float", "too few", "one-hot"],
)
def test_labels_that_are_no_classes(fisher, labels, message):
    with pytest.raises(ValueError, match=message):
        _directions(_logits(), labels, fisher)


@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_types_that_need_no_labels_do_without(fisher):
    assert torch.isfinite(_all(_directions(_logits(), None, fisher, _uniforms()))).all()


@pytest.mark.parametrize(
    ("fisher", "likelihood", "shape", "labels"),
    [
        ("mc", "categorical", (6, 4), None),
        ("normalised", "categorical", (6, 4, 2), torch.zeros(6, 2, dtype=torch.int64)),
        ("normalised", "gaussian", (6, 2), None),
    ],
)
def test_types_that_draw_need_uniforms(fisher, likelihood, shape, labels):
    with pytest.raises(ValueError, match="uniform draws"):
        _directions(torch.zeros(shape), labels, fisher, None, likelihood)


# ---------------------------------------------------------------------------------------------
# Several observations a sample: positions, Bernoulli and Gaussian outputs
# ---------------------------------------------------------------------------------------------

# Logits' shapes by likelihood; the last sample's second position is not observed.
SHAPES = {
    "categorical": [(5, CLASSES), (5, CLASSES, 3), (5, CLASSES, 2, 3)],
    "bernoulli": [(5,), (5, 1), (5, 3), (5, 2, 3)],
    "gaussian": [(5,), (5, 1), (5, 3), (5, 2, 3)],
}
CASES = [
    pytest.param(likelihood, shape, id=f"{likelihood}-{'x'.join(map(str, shape))}")
    for likelihood, shapes in SHAPES.items()
    for shape in shapes
]
every_case = pytest.mark.parametrize(("likelihood", "shape"), CASES)


def _observed(likelihood, shape, dtype=torch.float64, scale=2.0):
    """Logits, and labels of which some are ignored where the likelihood can."""
    generator = torch.Generator().manual_seed(1)
    logits = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    if likelihood == "gaussian":
        return logits, torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if likelihood == "bernoulli":
        return logits, torch.randint(0, 2, shape, generator=generator).to(dtype)
    labels = torch.randint(0, CLASSES, (shape[0], *shape[2:]), generator=generator)
    if len(shape) > 2:
        labels.view(shape[0], -1)[-1, 1] = IGNORE_INDEX
    return logits, labels


def _number(likelihood, shape):
    return math.prod(shape[2:] if likelihood == "categorical" else shape[1:])


def _draws(likelihood, shape, draws, seed=0):
    columns = draws * _number(likelihood, shape)
    return torch.from_numpy(np.random.default_rng(seed).random((shape[0], columns)))


def _loss(logits, labels, likelihood):
    """Minus the log-likelihood, up to a constant."""
    if likelihood == "categorical":
        return F.cross_entropy(logits, labels, reduction="sum")
    if likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    return F.mse_loss(logits, labels, reduction="sum") / 2


def _blocks(likelihood, shape, block):
    """Block-diagonal matrices in the logits' own order, from one block an observation."""
    samples, size = shape[0], math.prod(shape[1:])
    places = torch.arange(size).reshape(shape[1:])
    groups = (
        places.reshape(len(places), -1).T if likelihood == "categorical" else places.view(-1, 1)
    )
    whole = torch.zeros(samples, size, size, dtype=torch.float64)
    for sample in range(samples):
        for index, group in enumerate(groups):
            whole[sample, group.unsqueeze(1), group] = block(sample, index)
    return whole


def _reference_covariance(logits, labels, likelihood):
    """The label's covariance given the logits, zero where it is not observed."""
    shape = logits.shape

    def block(sample, index):
        if likelihood == "gaussian":
            return torch.ones(1, 1, dtype=torch.float64)
        if likelihood == "bernoulli":
            p = 1 / (1 + math.exp(-float(logits[sample].flatten()[index])))
            return torch.full((1, 1), p * (1 - p), dtype=torch.float64)
        p = torch.softmax(logits[sample].reshape(CLASSES, -1)[:, index].double(), dim=0)
        ignored = labels[sample].flatten()[index] == IGNORE_INDEX
        return (torch.diag(p) - torch.outer(p, p)) * (not ignored)

    return _blocks(likelihood, shape, block)


@every_case
def test_exact_is_the_covariance_of_all_labels(likelihood, shape):
    logits, labels = _observed(likelihood, shape)
    directions = _directions(logits, labels, "exact", None, likelihood)
    expected = _reference_covariance(logits, labels, likelihood)
    torch.testing.assert_close(_second_moment(directions), expected, rtol=0, atol=1e-14)
    assert directions.trace == pytest.approx(float(expected.diagonal(dim1=1, dim2=2).sum()))
    assert directions.discarded <= 1e-14 * directions.trace


@every_case
def test_empirical_is_minus_the_gradient_of_the_torch_loss(likelihood, shape):
    logits, labels = _observed(likelihood, shape)
    logits.requires_grad_()
    _loss(logits, labels, likelihood).backward()
    directions = _directions(logits, labels, "empirical", None, likelihood)
    assert directions.counts.max() == 1
    torch.testing.assert_close(directions.first, -logits.grad, rtol=0, atol=1e-14)


@every_case
def test_mc_of_every_likelihood_converges_to_exact(likelihood, shape):
    logits, labels = _observed(likelihood, shape)
    draws = 500
    mc = _directions(logits, labels, "mc", _draws(likelihood, shape, draws), likelihood)
    expected = _reference_covariance(logits, labels, likelihood)
    # A product of two standard normals has a standard deviation of 1, a square of sqrt(2).
    bound = 5 * (math.sqrt(2) if likelihood == "gaussian" else 0.5) / math.sqrt(draws)
    error = (_second_moment(mc) - expected).abs().max()
    assert error < bound
    few = _directions(logits, labels, "mc", _draws(likelihood, shape, 2), likelihood)
    assert (_second_moment(few) - expected).abs().max() > bound


def test_mc_draws_a_bernoulli_label_by_its_probability():
    logits = torch.tensor([[0.25]], dtype=torch.float64).logit()
    low, high = (
        float(_directions(logits, None, "mc", torch.tensor([[u]]), "bernoulli").first)
        for u in (0.24, 0.26)
    )
    assert (low, high) == (pytest.approx(0.75), pytest.approx(-0.25))


def test_mc_draws_a_gaussian_label_by_the_inverse_of_its_distribution():
    uniforms = torch.tensor([[0.0, 0.5, 0.975]], dtype=torch.float64)
    drawn = _directions(torch.randn(1, 3).double(), None, "mc", uniforms, "gaussian").first[0]
    assert torch.isfinite(drawn).all()
    assert drawn.tolist()[1:] == [0.0, pytest.approx(1.959963984540054)]


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalised_has_a_unit_residual_for_every_observation(likelihood, shape, dtype):
    logits, labels = _observed(likelihood, shape, dtype)
    uniforms = _draws(likelihood, shape, 1)
    directions = _directions(logits, labels, "normalised", uniforms, likelihood)
    assert directions.counts.max() == 1
    found = directions.first.double()
    if likelihood == "categorical":
        lengths = found.norm(dim=1)
        expected = (labels != IGNORE_INDEX).double()
    else:
        lengths, expected = found.abs(), torch.ones(shape, dtype=torch.float64)
    torch.testing.assert_close(lengths, expected, rtol=0, atol=1e-6)
    # Up to one sign an observation, it is the direction of the residual.
    residual = _directions(logits, labels, "empirical", None, likelihood).first.double()
    if likelihood == "categorical":
        cosines = (found * residual).sum(1) / residual.norm(dim=1).clamp_min(1e-300)
        torch.testing.assert_close(cosines.abs(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_normalised_of_outputs_does_not_depend_on_the_label(likelihood):
    logits, labels = _observed(likelihood, (5, 3))
    uniforms = _draws(likelihood, (5, 3), 2)
    found = [
        _all(_directions(logits, y, "normalised", uniforms, likelihood))
        for y in (labels, 1 - labels.clamp(0, 1), None)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_normalised_of_one_output_needs_no_draws(likelihood, shape):
    logits, labels = _observed(likelihood, shape)
    directions = _directions(logits, labels, "normalised", None, likelihood)
    assert _second_moment(directions).flatten().tolist() == [1.0] * 5


@pytest.mark.parametrize("gap", [0.0, 20.0, 200.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalised_is_finite_and_exact_where_a_sigmoid_or_softmax_saturates(gap, dtype):
    logits = torch.tensor([[gap, -gap]], dtype=dtype)
    uniforms = torch.tensor([[0.1, 0.9]], dtype=torch.float64)
    for labels in ([[0.0, 1.0]], [[1.0, 0.0]]):
        found = _directions(
            logits, torch.tensor(labels, dtype=dtype), "normalised", uniforms, "bernoulli"
        )
        assert found.first.tolist() == [[1.0, -1.0]]
    logits = torch.tensor([[gap + 0.1, 0.3, -1.1, 0.7], [0.0, gap, 0.2, -gap]], dtype=dtype).T[None]
    labels = torch.tensor([[0, 1]])
    found = _directions(logits, labels, "normalised", uniforms).first[0].double()
    expected = [
        sign * _reference_unit_residual(logits[0, :, i].tolist(), i)
        for i, sign in enumerate((1, -1))
    ]
    tolerance = 1e-7 if dtype == torch.float32 else 1e-12
    assert (found - torch.stack(expected, dim=1)).abs().max() < tolerance


@pytest.mark.parametrize("gap", [5.0, 30.0, 80.0])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_small_bernoulli_residuals_keep_their_digits(gap, label):
    logits = torch.tensor([[gap if label else -gap]])
    small = math.exp(-gap) / (1 + math.exp(-gap))
    empirical = _directions(logits, torch.tensor([[label]]), "empirical", None, "bernoulli")
    assert float(empirical.first) == pytest.approx(small if label else -small, rel=1e-6)
    exact = _directions(logits, None, "exact", None, "bernoulli")
    assert float(_second_moment(exact)) == pytest.approx(small * (1 - small), rel=1e-6)


@every_case
def test_random_signs_leave_the_sum_over_observations_in_the_mean(likelihood, shape):
    logits, labels = _observed(likelihood, shape)
    draws = 500
    uniforms = _draws(likelihood, shape, draws)
    if _number(likelihood, shape) == 1:
        uniforms = uniforms[:, :1]
    directions = _directions(logits, labels, "normalised", uniforms, likelihood)
    signs = _draws(likelihood, shape, 1)
    unit = _directions(logits, labels, "normalised", signs, likelihood).first

    def block(sample, index):
        if likelihood != "categorical":
            return torch.ones(1, 1, dtype=torch.float64)
        residual = unit[sample].reshape(CLASSES, -1)[:, index]
        return torch.outer(residual, residual)

    expected = _blocks(likelihood, shape, block)
    found = _second_moment(directions)
    # Signs cancel within an observation: only what is between two has noise.
    assert (found - expected).abs().max() < 5 / math.sqrt(draws)
    within = expected != 0
    torch.testing.assert_close(found[within], expected[within], rtol=0, atol=1e-12)
    if _number(likelihood, shape) > 1:
        flat = unit.flatten(1)
        one = flat.unsqueeze(2) * flat.unsqueeze(1)
        assert (one - expected).abs().max() > 0.1


@pytest.mark.parametrize("fisher", FISHER_TYPES)
def test_ignored_positions_contribute_nothing(fisher):
    shape = (5, CLASSES, 4)
    logits, labels = _observed("categorical", shape)
    labels[:, 1] = IGNORE_INDEX
    labels[0] = IGNORE_INDEX
    uniforms = _draws("categorical", shape, 2)
    directions = _directions(logits, labels, fisher, uniforms)
    found = _all(directions)
    assert found[:, 0].abs().max() == 0
    assert found[:, :, :, 1].abs().max() == 0
    # What else there is does not depend on them.
    other = logits.clone()
    other[0], other[:, :, 1] = 7.0, -3.0
    assert torch.equal(found, _all(_directions(other, labels, fisher, uniforms)))
    rest = [0, 2, 3]
    if fisher in ("exact", "empirical"):
        alone = _directions(logits[:, :, rest], labels[:, rest], fisher, uniforms)
        assert alone.trace == pytest.approx(directions.trace, rel=1e-12)
        whole = _second_moment(directions).view(5, CLASSES, 4, CLASSES, 4)
        torch.testing.assert_close(
            whole[:, :, rest][..., rest].reshape(5, 3 * CLASSES, -1), _second_moment(alone)
        )


@pytest.mark.parametrize("fisher", FISHER_TYPES)
def test_a_sample_whose_only_label_is_ignored_contributes_nothing(fisher):
    labels = _labels()
    labels[2] = IGNORE_INDEX
    found = _all(_directions(_logits(), labels, fisher, _uniforms(draws=1)))
    assert found[:, 2].abs().max() == 0
    assert (found.abs().amax((0, 2)) > 0).sum() == 5


@every_case
@pytest.mark.parametrize("tolerance", [0.0, 1e-5, 0.03, 0.3, 0.9])
def test_exact_leaves_out_no_more_than_its_tolerance(likelihood, shape, tolerance):
    logits, labels = _observed(likelihood, shape, scale=6.0)
    whole = _directions(logits, labels, "exact", None, likelihood)
    found = _directions(logits, labels, "exact", None, likelihood, tolerance=tolerance)
    missing = _second_moment(whole) - _second_moment(found)
    trace = float(missing.diagonal(dim1=1, dim2=2).sum())
    assert found.trace == pytest.approx(whole.trace, rel=1e-12)
    assert found.discarded == pytest.approx(trace, rel=1e-9, abs=1e-12 * whole.trace)
    assert found.discarded <= (tolerance + 1e-12) * found.trace
    # Only whole directions are missing.
    assert torch.linalg.eigvalsh(missing).min() > -1e-12
    assert int(found.counts.min()) >= 1


def test_exact_leaves_out_as_much_as_it_may_of_the_smallest():
    logits = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 14.0]], dtype=torch.float64)
    assert _directions(logits, None, "exact").counts.tolist() == [2, 2, 2]
    found = _directions(logits, None, "exact", tolerance=1e-3)
    # Even a certain sample keeps its longest direction.
    assert found.counts.tolist() == [2, 1, 1]
    assert 0 < found.discarded < 1e-3 * found.trace
    assert (found.first.abs().amax(1) > 0).all()


@pytest.mark.parametrize("fisher", FISHER_TYPES)
@every_case
def test_the_trace_is_the_sum_of_squares_and_any_samples_may_be_asked_for(
    likelihood, shape, fisher
):
    logits, labels = _observed(likelihood, shape)
    uniforms = _draws(likelihood, shape, 2)
    directions = _directions(logits, labels, fisher, uniforms, likelihood)
    whole = _second_moment(directions)
    assert directions.trace == pytest.approx(float(whole.diagonal(dim1=1, dim2=2).sum()))
    some = torch.tensor([3, 0, 4])
    flat = torch.stack(directions.of(some)).reshape(int(directions.counts.max()), 3, -1)
    found = torch.einsum("nsc,nsd->scd", flat, flat)
    torch.testing.assert_close(found, whole[some], rtol=0, atol=1e-14)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_labels_that_do_not_fit_the_likelihood(likelihood):
    logits = torch.zeros(6, 4, 2)
    wrong = [(torch.zeros(6, 4, 3), "shape")]
    if likelihood == "categorical":
        wrong.append((torch.full((6, 2), 4), "lie in \\[0, 4\\)"))
        wrong.append((torch.full((6, 2), -1), "lie in \\[0, 4\\)"))
    else:
        wrong.append((torch.full((6, 4, 2), math.inf), "finite"))
    if likelihood == "bernoulli":
        wrong.append((torch.full((6, 4, 2), 1.5), "lie in \\[0, 1\\]"))
        wrong.append((torch.full((6, 4, 2), -1.0), "lie in \\[0, 1\\]"))
    for labels, message in wrong:
        with pytest.raises(ValueError, match=message):
            _directions(logits, labels, "empirical", None, likelihood)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_bernoulli_labels_of_any_type(dtype):
    logits, labels = _observed("bernoulli", (5, 3))
    found = _directions(logits, labels.to(dtype), "empirical", None, "bernoulli").first
    expected = _directions(logits, labels, "empirical", None, "bernoulli").first
    assert torch.equal(found, expected)
