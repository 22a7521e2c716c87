"""What a merge keeps of its clients, and who is told."""

import warnings
from dataclasses import replace

import pytest
import torch
from helpers.merging import small_classifier, small_data, update_of

from lightning_fedfisher import fit_closed_form_head, merge_updates
from lightning_fedfisher.merge.agreement import describe_disagreement
from lightning_fedfisher.merge.layer_state import LayerState, Progress
from lightning_fedfisher.merge.methods import METHODS

METHOD = METHODS["fedfisher"]


def batch(label):
    """Samples of one class."""
    x, _ = small_data(label)[:]
    return x, torch.full((len(x),), label)


def opposed():
    """Updates of two clients whose weights differ by their sign."""
    model, updates = small_classifier(), []
    for _ in range(2):
        updates.append(update_of(model, small_data(), "kfac"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.neg_()
    return updates


def done(agreement):
    return LayerState((1.0, 1.0), 5, 1.0, 1e-5, Progress.CONVERGED, 32, agreement)


def test_clients_that_disagree_are_told_of_by_methods_that_read_curvature():
    with pytest.warns(UserWarning, match=r"keep less than 60% of what the clients' own compute"):
        result = merge_updates(opposed(), method="regmean")
    assert min(layer.agreement for layer in result.layers) < 0.6
    assert any("keep less" in text for text in result.warnings)


def test_of_weights_that_cancel_nothing_is_left_and_averaging_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = merge_updates(opposed(), method="fedavg")
    assert [layer.agreement for layer in result.layers] == pytest.approx([0] * 2, abs=1e-6)


def test_clients_that_agree_keep_everything():
    update = update_of(small_classifier(), small_data(), "kfac")
    for layer in merge_updates([update, update], allow_duplicates=True).layers:
        assert layer.agreement == pytest.approx(1, abs=1e-6)


def test_hidden_layers_are_counted_and_the_worst_is_named():
    header = update_of(small_classifier(), small_data(), "kfac").header
    first, output = (layer.name for layer in header.layers)
    assert header.output_layer == output
    told = describe_disagreement(METHOD, header, [done(0.25), done(0.1)])
    assert "in 1 of 1 hidden layers the merged weights keep less than 60%" in told
    assert f"(least: {first}, 25%)" in told
    # A head may have started at zero, and of a layer that is not done nothing is known.
    assert describe_disagreement(METHOD, header, [done(0.9), done(0.1)]) == ""
    assert describe_disagreement(METHOD, header, [LayerState.waiting(2), done(0.9)]) == ""
    # So may what multiplies by no matrix.
    scales = replace(header, kinds={**header.kinds, first: "diagonal"})
    assert describe_disagreement(METHOD, scales, [done(0.25), done(0.9)]) == ""


@pytest.mark.parametrize("method", ["closed_form_head", "regmean"])
def test_least_squares_fits_are_to_differ(method):
    fits = [fit_closed_form_head(small_classifier(), [batch(k)], progress=False) for k in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = merge_updates(fits, method=method)
    assert {layer.agreement for layer in result.layers} == {None}
