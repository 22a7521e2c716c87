"""What is logged of a whole federation."""

import wandb
from helpers.wandb_runs import read_runs

from lightning_fedfisher.results import FederationRecord, MergeRecord, ModelScore
from lightning_fedfisher.tracking import log_federation


def test_a_federation_that_was_not_tested_is_shown_without_scores(logger, tmp_path):
    score = ModelScore(50.0, 1.0, 2.0)  # without a confusion matrix
    bare = FederationRecord("t", [], [MergeRecord("fedavg", [])])
    log_federation(logger, bare)
    merge = MergeRecord("m", [], score=score, unlabelled_samples=300)
    log_federation(logger, FederationRecord("t", [], [merge]))
    wandb.finish()
    run = read_runs(tmp_path)["server"]
    assert run.charts == {"accuracy"}
    assert run.table("comparison") == [["m", 50, 1, 2, None, None, None, None, 0, 300]]
