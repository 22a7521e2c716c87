"""Second moments of inputs as those behind a rectifier, and their powers in float64."""

import torch

SIZE = 640


def second_moment(samples, dtype=torch.float32, mean=3.0):
    """Of inputs with a mean larger than their spread."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -1, SIZE).double()
    inputs = mean + torch.randn(samples, SIZE, generator=generator).double() * scale
    return (inputs.mT @ inputs / samples).to(dtype)


def reference_power(matrix, exponent):
    """By a decomposition in float64."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return (vectors * values.clamp_min(0).pow(exponent)) @ vectors.mT
