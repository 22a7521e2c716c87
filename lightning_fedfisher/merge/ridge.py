"""Ridge regression from the clients' least-squares fits: the head that all samples would give.

The clients' quadratics hold all that a linear regression needs to know of their samples: the second
moment ``A`` of the inputs, and with the fits ``W_k`` those of labels and inputs,
``B = sum_k p_k W_k A_k``. So the ridge can be chosen as if the samples were there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher.curvature.input_gram import InputGram
from lightning_fedfisher.merge.objective import Quadratic
from lightning_fedfisher.merge.solvers import Solver

# Ridges that are tried, as powers of ten of the inputs' mean variance, and how many at a time.
_LEAST, _MOST, _TRIED = -13.0, 3.0, 161
# Times that the search is repeated between the neighbours of the best.
_REFINED = 2
# Degrees of freedom, as a fraction of the samples, that must be left to tell an error.
_LEFT = 1e-4


class RidgeRegression(Solver):
    """The linear regression of all clients' samples together, in one step.

    The bias is not shrunk. All is computed in float64.

    Attributes:
        ridge: What was added to the variance of the inputs, as a multiple of its mean over them;
            0 before the step.

    Example:
        >>> from lightning_fedfisher.merge.objective import LeastSquares
        >>> gram = InputGram(torch.tensor([[2.0]], dtype=torch.float64), rows=1)
        >>> fits = [torch.tensor([[1.0]], dtype=torch.float64), torch.tensor([[3.0]]).double()]
        >>> fit = LeastSquares(8, (0.0, 0.0), observations=(1.0, 1.0), has_bias=False)
        >>> solver = RidgeRegression(Quadratic([1, 1], fits, [gram, gram], fit), ridge=1.0)
        >>> solver.advance(1)
        >>> solver.weights
        tensor([[1.]], dtype=torch.float64)
    """

    def __init__(self, problem: Quadratic, ridge: float | None = None) -> None:
        """Starts at the average.

        Args:
            problem: The quadratic, of least-squares fits.
            ridge: What to add to the variance of the inputs, as a multiple of its mean over them;
                None chooses it by generalised cross-validation (`choose_ridge`).

        Raises:
            ValueError: If the ridge is negative, or the weights are no fits.
        """
        if problem.fit is None or problem.kind is not InputGram:
            raise ValueError(
                "a ridge regression takes least-squares fits with input_gram curvature"
            )
        if ridge is not None and not 0 <= ridge < math.inf:
            raise ValueError(f"ridge must not be negative, got {ridge}")
        super().__init__(problem)
        self.ridge, self._given, self._fit = 0.0, ridge, problem.fit

    @property
    @override
    def residual(self) -> float:
        # What is left of the gradient is the ridge's.
        return 0.0 if self.finished else super().residual

    @override
    def _step(self) -> None:
        gram, crossed, squares, observations = self._moments()
        # What centring leaves of a direction without variance goes by what was there before.
        rounding = len(gram) * torch.finfo(gram.dtype).eps * float(gram.trace())
        ones, mean, mean_label = gram.new_ones(()), gram.new_zeros(0), crossed.new_zeros(0)
        if self._fit.has_bias:
            # The bias takes the means, and what is left has none.
            ones, mean, mean_label = gram[-1, -1], gram[:-1, -1], crossed[:, -1]
            gram = gram[:-1, :-1] - torch.outer(mean, mean) / ones
            crossed = crossed[:, :-1] - torch.outer(mean_label, mean) / ones
            squares -= float(mean_label.square().sum() / ones)
        values, vectors = torch.linalg.eigh(gram)
        seen = values > rounding
        values, turned = values * seen, (crossed @ vectors) * seen
        scale = float(values.mean()) or 1.0
        if self._given is None:
            lengths, labels = turned.square().sum(0) / scale, self._fit.samples * observations
            has_bias = self._fit.has_bias
            self.ridge = choose_ridge(values / scale, lengths, squares, labels, has_bias)
        else:
            self.ridge = self._given
        shrunk = torch.where(seen, values + self.ridge * scale, 1.0)
        weights = (turned / shrunk) @ vectors.mT
        if self._fit.has_bias:
            bias = (mean_label - weights @ mean) / ones
            weights = torch.cat([weights, bias.unsqueeze(1)], dim=1)
        self.weights = weights.to(self.weights)
        self.finished = True

    def _moments(self) -> tuple[Tensor, Tensor, float, float]:
        """Adds up second moments: of the inputs, of labels and inputs, and of the labels.

        Returns:
            The three, and the mean number of labels of a sample.
        """
        problem, fit = self.problem, self._fit
        # Apple's GPUs have no float64.
        where = torch.device("cpu") if self.weights.device.type == "mps" else self.weights.device
        columns = self.weights.shape[1]
        gram = torch.zeros(columns, columns, dtype=torch.float64, device=where)
        crossed = torch.zeros(self.weights.shape, dtype=torch.float64, device=where)
        squares = observations = 0.0
        for p, weights, curvature, error, labels in zip(
            *(problem.client_weights, problem.weights, problem.curvatures),
            *(fit.squared_errors, fit.observations),
            strict=True,
        ):
            assert isinstance(curvature, InputGram)
            exact, own = curvature.column_factor.to(gram), weights.to(gram)
            pull = own @ exact
            gram.add_(exact, alpha=p)
            crossed.add_(pull, alpha=p)
            squares += p * (error + float((own * pull).sum()))
            observations += p * labels
        return gram, crossed, squares, observations


def choose_ridge(
    values: Tensor, projections: Tensor, squares: float, samples: float, has_bias: bool
) -> float:
    """Chooses a ridge by generalised cross-validation (Golub, Heath & Wahba, 1979).

    It is the ridge of the least ``error / (1 - freedom / samples)^2``, where ``error`` is the mean
    squared error over the samples themselves, and ``freedom`` the trace of the matrix that maps
    labels to predictions. That estimates the error of leaving one sample out after the other.

    Args:
        values: Eigenvalues of the inputs' covariance, of shape ``(n,)``.
        projections: Squared length of the covariance of labels and inputs along each eigenvector.
        squares: Mean squared length of the labels, without their mean if there is a bias.
        samples: Number of samples.
        has_bias: Whether there is a bias, which takes a degree of freedom.

    Returns:
        The ridge, in units of the eigenvalues.

    Example:
        >>> noise = choose_ridge(torch.ones(1), torch.zeros(1), 1.0, samples=10, has_bias=True)
        >>> signal = choose_ridge(torch.ones(1), torch.ones(1), 1.0, samples=10, has_bias=True)
        >>> noise == 1000.0, signal < 1e-6
        (True, True)
    """
    low, high = _LEAST, _MOST
    best = high
    for _ in range(1 + _REFINED):
        tried = torch.linspace(low, high, _TRIED, dtype=torch.float64)
        ridges = 10.0 ** tried.unsqueeze(1).to(values.device)
        shrunk = values + ridges
        explained = (projections * (values + 2 * ridges) / shrunk.square()).sum(1)
        left = 1 - ((values / shrunk).sum(1) + has_bias) / samples
        error = (squares - explained).clamp_min(squares * torch.finfo(torch.float64).eps)
        scores = torch.where(left > _LEFT, error / left.square(), math.inf).cpu()
        index = int(scores.argmin()) if scores.isfinite().any() else len(tried) - 1
        best = float(tried[index])
        low, high = float(tried[max(index - 1, 0)]), float(tried[min(index + 1, _TRIED - 1)])
    return float(10.0**best)
