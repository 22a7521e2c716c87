"""Ridge regression from fits: against the samples themselves, in float64."""

import pytest
import torch

from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.curvature.input_gram import InputGram
from lightning_fedfisher.curvature.linalg import least_squares
from lightning_fedfisher.merge.objective import LeastSquares, Quadratic
from lightning_fedfisher.merge.ridge import RidgeRegression, choose_ridge


def _samples(samples, features=5, outputs=2, seed=0, noise=0.5):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -2, features, dtype=torch.float64)
    x = 1 + torch.randn(samples, features, generator=generator, dtype=torch.float64) * scales
    weights = torch.randn(outputs, features, generator=generator, dtype=torch.float64)
    error = torch.randn(samples, outputs, generator=generator, dtype=torch.float64)
    return x, x @ weights.mT + 3 + noise * error


def _problem(splits, has_bias=True):
    """The quadratic of clients, each with a fit to its own samples."""
    fits, grams, errors = [], [], []
    for x, y in splits:
        x = torch.cat([x, torch.ones(len(x), 1)], dim=1) if has_bias else x
        fit = least_squares(x.mT @ x, y.mT @ x)
        fits.append(fit)
        grams.append(InputGram(x.mT @ x / len(x), rows=y.shape[1]))
        errors.append(float((x @ fit.mT - y).square().sum()) / len(x))
    weights = [len(x) for x, _ in splits]
    known = LeastSquares(sum(weights), tuple(errors), (1.0,) * len(weights), has_bias)
    return Quadratic(weights, fits, grams, known)


def _solve(problem, ridge=None):
    solver = RidgeRegression(problem, ridge)
    solver.advance(1)
    assert solver.finished
    assert solver.converged
    return solver


def _by_samples(x, y, ridge, has_bias=True):
    """The textbook: the mean is taken out, the rest is shrunk."""
    mean, shift = (x.mean(0), y.mean(0)) if has_bias else (0.0, 0.0)
    x, y = x - mean, y - shift
    gram = x.mT @ x / len(x)
    shrunk = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram))
    weights = torch.linalg.solve(shrunk, x.mT @ y / len(x)).mT
    if not has_bias:
        return weights
    return torch.cat([weights, (shift - weights @ mean).unsqueeze(1)], dim=1)


SPLITS = {
    "one": (40,),
    "two": (30, 10),
    "fewer than features": (3, 2, 1, 30, 4),
    "single samples": (1,) * 40,
}


def _split(x, y, sizes, sort):
    order = y[:, 0].argsort() if sort else torch.arange(len(y))
    return list(zip(x[order].split(sizes), y[order].split(sizes), strict=True))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("ridge", [1e-3, 0.3, None])
@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_it_is_the_regression_of_all_samples_in_one_place(sizes, sort, ridge, has_bias):
    x, y = _samples(40)
    solver = _solve(_problem(_split(x, y, sizes, sort), has_bias), ridge)
    if ridge is None:
        one = _solve(_problem([(x, y)], has_bias))
        assert solver.ridge == pytest.approx(one.ridge, rel=1e-3)
    expected = _by_samples(x, y, solver.ridge, has_bias)
    torch.testing.assert_close(solver.weights, expected, rtol=1e-8, atol=1e-8)


def test_without_a_ridge_it_is_the_minimum_of_the_quadratic():
    x, y = _samples(40)
    problem = _problem(_split(x, y, (25, 15), True))
    solver = _solve(problem, ridge=0.0)
    assert problem.gradient(solver.weights).norm() < 1e-12 * problem.start.pull
    fit = torch.linalg.lstsq(torch.cat([x, torch.ones(40, 1)], dim=1), y).solution.mT
    torch.testing.assert_close(solver.weights, fit, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("samples", [8, 40])
def test_the_error_that_is_compared_is_that_of_the_hat_matrix(samples, has_bias):
    x, y = _samples(samples)
    centred = x - x.mean(0) if has_bias else x
    labels = y - y.mean(0) if has_bias else y
    gram, crossed = centred.mT @ centred / samples, labels.mT @ centred / samples
    values, vectors = torch.linalg.eigh(gram)
    projections, squares = (
        (crossed @ vectors).square().sum(0),
        float(labels.square().sum()) / samples,
    )
    found = choose_ridge(values, projections, squares, samples, has_bias)

    def score(ridge):
        shrunk = gram + ridge * torch.eye(5)
        hat = centred @ torch.linalg.solve(shrunk, centred.mT) / samples
        hat = hat + has_bias / samples
        error = (y - hat @ y).square().sum() / samples
        return float(error / (1 - hat.trace() / samples) ** 2)

    grid = [score(10.0**power) for power in torch.linspace(-6, 3, 400).tolist()]
    assert score(found) <= min(grid) * (1 + 1e-6)


def test_noise_is_shrunk_away_and_signal_is_not():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 30, generator=generator, dtype=torch.float64)
    noise = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    signal = x @ torch.randn(30, 4, generator=generator, dtype=torch.float64)
    assert _solve(_problem([(x, noise)])).ridge > 0.5
    assert _solve(_problem([(x, signal)])).ridge < 1e-6


def test_a_single_sample_gives_its_label():
    x, y = _samples(1)
    solver = _solve(_problem([(x, y)]))
    torch.testing.assert_close(x @ solver.weights[:, :-1].mT + solver.weights[:, -1], y)


def test_a_ridge_is_no_negative_number():
    for ridge in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="ridge must not be negative"):
            RidgeRegression(_problem([_samples(9)]), ridge)


def test_it_takes_fits_alone():
    problem = _problem([_samples(9)])
    without = Quadratic([1], problem.weights, problem.curvatures)
    other = Quadratic([1], problem.weights, [Diagonal(torch.ones(2, 6))], problem.fit)
    for refused in (without, other):
        with pytest.raises(ValueError, match="takes least-squares fits"):
            RidgeRegression(refused)


def _hard(case):
    """Inputs that rounding punishes."""
    x, y = _samples(120, features=6)
    if case == "a copy and a near constant":
        x[:, 4] = x[:, 3]
        x[:, 5] = 1000 + 1e-2 * (x[:, 5] - 1)
    elif case == "large means":
        x = x + 1000 * x.std(0)
    elif case == "unlike scales":
        x = x * torch.tensor([1e-3, 1.0, 2e3, 5e4, 1.0, 1e-2], dtype=torch.float64)
    return x, y


@pytest.mark.parametrize("size", [1, 10, 60])
@pytest.mark.parametrize("case", ["a copy and a near constant", "large means", "unlike scales"])
def test_badly_scaled_inputs_do_not_make_the_split_matter(case, size):
    x, y = _hard(case)
    together, apart = (
        _solve(_problem([*zip(x.split(n), y.split(n), strict=True)])) for n in (120, size)
    )
    ones = torch.cat([x, torch.ones(120, 1)], dim=1)
    predicted, expected = ones @ apart.weights.mT, ones @ together.weights.mT
    assert float((predicted - expected).square().mean().sqrt()) < 1e-6 * float(y.std())
    largest = float(together.weights.abs().max())
    assert float(apart.weights.abs().max()) < 2 * largest  # a constant may be a bias
