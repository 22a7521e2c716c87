"""Clients that weigh far more than the median client are named, with what and where."""

import inspect

import torch
from helpers.federation import tiny_updates

from lightning_fedfisher.merge import layer_loader
from lightning_fedfisher.merge.options import MergeOptions
from lightning_fedfisher.merge.outliers import describe_outliers, outliers_as_sent


def test_outliers_are_named_with_what_and_where():
    weighed = torch.ones(5, 3, 3).double()
    weighed[:, 1, 0] = torch.tensor([20.0, 50, 1, 30, 40])
    weighed[2, 1, 2] = 1e9
    told = describe_outliers(weighed, ["ann", "bob", "cid"], list("vwxyz"), 10).splitlines()
    assert told[0] == (
        "bob has, of the median client's, 1e+09 times the pull in x, 50 times the information in "
        "w, z, y and 1 more layers"
    )
    assert "caps each of these at 10 times the median client's" in told[1]
    assert "does not cap it" in describe_outliers(weighed, ["ann", "bob", "cid"], list("vwxyz"))
    assert describe_outliers(torch.full((1, 3, 3), 7.5), list("abc"), ["v"], 10) == ""
    assert len(describe_outliers(torch.full((1, 3, 3), 7.6), list("abc"), ["v"], 10)) > 100
    assert describe_outliers(torch.full((1, 2, 3), 9.9), list("ab"), ["v"], 10) == ""
    assert describe_outliers(torch.full((1, 3, 3), 5.0), list("abc"), ["v"]) == ""
    assert "max_influence=2" in describe_outliers(torch.full((1, 3, 3), 5.1), list("abc"), ["v"])
    told = describe_outliers(torch.full((1, 3, 3), 9.0), ["a", "b", "c"], ["v"], usual=(9, 8, 9))
    assert told.splitlines()[0] == "a has, of the median client's, 9 times the distance in v"


def test_updates_are_measured_once_and_within_the_usual_memory(tmp_path, monkeypatch):
    measured, original = [], layer_loader.measure
    monkeypatch.setattr(layer_loader, "measure", lambda *a: (measured.append(a), original(*a))[1])
    updates = tiny_updates(tmp_path, curvature="kfac")
    assert "times the distance" not in outliers_as_sent(updates)
    assert len(measured) == len(updates[0].layers)
    default = inspect.signature(layer_loader.LayerLoader).parameters["memory_budget"].default
    assert default == MergeOptions().memory_budget
