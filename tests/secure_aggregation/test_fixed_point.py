"""Numbers in fixed point: their sums are off by little, and what does not fit is refused."""

import pytest
import torch
from helpers.client_sums import CLIENTS, add_up

from lightning_fedfisher import ClientUpdate, FedFisherError
from lightning_fedfisher.secure_aggregation import (
    client_sums,
    divisors,
    from_fixed,
    to_fixed,
    update_from_sums,
)


@pytest.mark.parametrize(("fraction_bits", "limbs"), [(20, 1), (40, 1), (20, 3), (40, 2)])
def test_sums_are_off_by_half_a_step_for_each_client(fraction_bits, limbs):
    generator = torch.Generator().manual_seed(0)
    shape = (CLIENTS, 50)
    # Exact in float64, with more bits than are kept, and of either sign.
    numbers = torch.randint(-(2**45), 2**45, shape, generator=generator).double() * 2.0**-44
    faint = torch.randint(-(2**45), 2**45, shape, generator=generator).double() * 2.0**-99
    plain = [{"a": one, "b": other} for one, other in zip(numbers, faint, strict=True)]
    fixed = [to_fixed(tensors, CLIENTS, fraction_bits, limbs, divisors={}) for tensors in plain]
    assert fixed[0]["a"].shape == (limbs, 50)
    total = from_fixed(add_up(fixed), fraction_bits)
    step = 2.0 ** -(fraction_bits * limbs)
    for name, exact in add_up(plain).items():
        assert float((total[name] - exact).abs().max()) <= CLIENTS * step / 2, name


def _scattered(updates, low, high):
    """Information of all sizes, the same for all clients up to a factor."""
    generator = torch.Generator().manual_seed(1)
    changed = [dict(update._tensors) for update in updates]
    for layer in updates[0].layers:
        name = f"curvature/{layer.name}/values"
        size = low + (high - low) * torch.rand(layer.shape, generator=generator)
        for tensors in changed:
            tensors[name] = 10 ** (size + 0.3 * torch.randn(layer.shape, generator=generator))
    return [ClientUpdate(u.header, t) for u, t in zip(updates, changed, strict=True)]


def _quotients(updates):
    """The merge by its definition, matrix by layer name."""
    found = {}
    for layer in updates[0].layers:
        p = [u.num_samples * u.block(layer).values.double() for u in updates]
        pulls = sum(q * u.weights(layer).double() for q, u in zip(p, updates, strict=True))
        found[layer.name] = pulls / sum(p)
    return found


def _in_fixed_point(updates, **options):
    plain = [client_sums(update, sample_unit=1e4) for update in updates]
    sent = [to_fixed(sums, 100, divisors=divisors(sums), **options) for sums in plain]
    total = update_from_sums(from_fixed(add_up(sent)), updates[0], sample_unit=1e4)
    return {layer.name: total.weights(layer).double() for layer in total.layers}


def test_information_of_certain_clients_survives_fixed_point(updates):
    certain = _scattered(updates, -16, 0)
    expected = _quotients(certain)
    for name, found in _in_fixed_point(certain).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("limbs", [1, 2])
def test_what_is_too_faint_for_fixed_point_leaves_weights_among_the_clients(updates, limbs):
    certain = _scattered(updates, -30, 0)
    found = _in_fixed_point(certain, limbs=limbs)
    beyond = 0
    for layer in certain[0].layers:
        weights = torch.stack([update.weights(layer).double() for update in certain])
        least, most = weights.min(0).values, weights.max(0).values
        room = (1 + weights.abs().max(0).values) / 512
        assert (found[layer.name] >= least - room).all(), layer.name
        assert (found[layer.name] <= most + room).all(), layer.name
        beyond += int((found[layer.name] - _quotients(certain)[layer.name] > 1e-3).sum())
    assert beyond  # some were


def test_numbers_that_leave_no_room_are_refused(updates):
    total = client_sums(updates[0])
    room = 2.0**63 / 8 / 2.0**40
    total["weights/network.0"] = torch.full((3, 10), room * 1.001)
    total["information_times_weights/network.2"] = torch.full((4, 28), torch.nan)
    with pytest.raises(
        FedFisherError,
        match=r"^weights/network\.0, information_times_weights/network\.2 hold numbers",
    ) as refused:
        to_fixed(total, 8, divisors=divisors(total))
    too_large, no_number = sorted(refused.value.offenders, reverse=True)
    assert too_large == "weights/network.0 takes integers up to 1.154e+18, not below 1.153e+18"
    assert no_number == "information_times_weights/network.2 is not finite"
    total["weights/network.0"] = torch.full((3, 10), -room * 0.999)
    del total["information_times_weights/network.2"]
    fixed = to_fixed(total, 8, divisors=divisors(total))
    back = from_fixed(add_up([fixed] * 8))
    torch.testing.assert_close(back["weights/network.0"], 8 * total["weights/network.0"].double())


@pytest.mark.parametrize("senseless", [{"clients": 0}, {"fraction_bits": 0}, {"limbs": 0}])
def test_senseless_fixed_point_is_refused(updates, senseless):
    with pytest.raises(ValueError, match="must be at least 1"):
        to_fixed(client_sums(updates[0]), **{"clients": 2, "divisors": {}} | senseless)


def test_what_is_not_in_fixed_point_is_refused(updates):
    total = to_fixed(client_sums(updates[0]), 2, divisors={})
    total |= {"client_weight": total["client_weight"].double(), "samples": torch.tensor(1)}
    with pytest.raises(FedFisherError, match=r"^client_weight, samples are not int64") as refused:
        from_fixed(total)
    assert refused.value.offenders == (
        "client_weight is torch.float64 of shape (2,)",
        "samples is torch.int64 of shape ()",
    )
