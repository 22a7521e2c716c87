import pytest
import torch
from helpers.layer_calls import draw

from lightning_fedfisher.extraction.accumulators.gram import GramSum


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize(
    ("size", "positions"),
    [(3, 3), (127, 127), (128, 128), (400, 400), (400, 3), (1100, 520), (1100, 1100)],
)
def test_a_gram_matrix_by_strips_is_the_whole_product(size, positions, contiguous):
    features = draw(2, size, positions)
    if contiguous:
        features = features.mT.contiguous().mT
    expected = 0.5 * torch.einsum("sip,sjp->ij", features, features)
    gram = GramSum(size, features)
    gram.add(features, 0.25)
    assert gram.total() is gram.total()
    gram.add(features, 0.25)
    torch.testing.assert_close(gram.total(), expected)


def test_vectors_wait_until_a_product_is_worth_it():
    gram, parts = GramSum(5, torch.zeros((), dtype=torch.float64)), []
    for seed in range(7):
        parts.append(draw(10, 5, 20, seed=seed))
        gram.add(parts[-1], 2.0)
        waits = (seed + 1) * 200 % 600  # 512 are enough
        assert sum(part.shape[1] for part in gram._waiting) == waits
    expected = 2 * sum(torch.einsum("sip,sjp->ij", part, part) for part in parts)
    torch.testing.assert_close(gram.total(), expected)


def test_long_sums_keep_the_rank_of_a_singular_moment():
    # The residuals of a softmax add up to nothing. With a hundred thousand positions in one sum,
    # float32 would leave a negative eigenvalue that no root could take.
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 10, 50_000, generator=generator)
    residuals = torch.softmax(logits, 1) - torch.nn.functional.one_hot(logits.argmax(1), 10).mT
    gram = GramSum(10, residuals)
    gram.add(residuals, 1.0)
    values = torch.linalg.eigvalsh(gram.total().double())
    assert values[0] > -1e-6 * values[-1]
