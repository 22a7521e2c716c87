import pytest

from lightning_fedfisher.extraction.limits import at_most, check_limit


@pytest.mark.parametrize("limit", [0, -1, 2.0, "all", True])
def test_other_values_are_refused_by_their_name(limit):
    with pytest.raises(ValueError, match="the_name must be at least 1, None or 'auto'"):
        check_limit("the_name", limit)


@pytest.mark.parametrize("limit", [1, 10**6, "auto", None])
def test_limits_are_accepted(limit):
    check_limit("the_name", limit)
    assert at_most(limit, 3, fraction=2, fewest=2) == {1: 1, "auto": 2}.get(limit, 3)
