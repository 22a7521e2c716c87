"""The merge study end to end on embedded data, and its tables."""

import dataclasses

import numpy as np
import pytest
import torch
from simulation import study as shared
from simulation.clients import EXTRACTIONS, labelled_samples
from simulation.data import load_images
from simulation.federations import MERGE_FEDERATIONS, Federation
from simulation.rows import read_rows
from simulation.tables.studies import merge_summary, merge_table
from studies import merge_study
from studies.merge_study import VARIANTS

from lightning_fedfisher.merge.methods import METHODS

FEDERATION = Federation("digits", "lenet", 1.0, 3, 0)
NAMES = ["best client", "ensemble", *EXTRACTIONS]


@pytest.fixture
def study(monkeypatch, tmp_path):
    """Runs the study on a tiny federation, with few steps of the published server."""
    monkeypatch.setattr(merge_study, "MERGE_FEDERATIONS", {"development": [FEDERATION]})
    monkeypatch.setattr(shared, "_EPOCHS", {"lenet": 1})
    for name, method in METHODS.items():
        steps = min(method.max_iterations, 10 if method.keeps_best else 1000)
        quick = dataclasses.replace(
            method, max_iterations=steps, steps_per_epoch=min(method.steps_per_epoch, 5)
        )
        monkeypatch.setitem(METHODS, name, quick)

    def run(*flags):
        command = ["merge_study.py", "--output-dir", str(tmp_path), *flags]
        monkeypatch.setattr("sys.argv", command)
        merge_study.main()
        return tmp_path / "development.csv"

    return run


def test_study_writes_a_row_for_each_method_and_goes_on(study, monkeypatch):
    table = study()
    whole = table.read_text()
    rows = read_rows(table)
    assert whole.startswith("# 20")  # the date, then the hardware
    assert [row["method"] for row in rows] == NAMES
    assert all(0 <= float(row["accuracy"]) <= 100 and float(row["nll"]) > 0 for row in rows)
    labels = {row["method"]: int(row["server_labels"]) for row in rows}
    published = {name for name, method in METHODS.items() if method.keeps_best}
    assert labels == {name: 500 if name in published else 0 for name in NAMES}
    merged = [float(row["server_seconds"]) > 0 for row in rows]
    assert merged == [False] * 2 + [True] * len(EXTRACTIONS)
    clients = sorted((table.parent / FEDERATION.name).iterdir())
    assert [file.name for file in clients] == [f"client-{k}.safetensors" for k in range(5)]

    # Interrupted before the last row: only that is done again, from the clients kept.
    extracted = []

    def extract(client, kinds, fisher, max_samples):
        extracted.append((kinds, fisher))
        return shared.extract(client, kinds, fisher, max_samples)

    monkeypatch.setattr(merge_study, "extract", extract)
    monkeypatch.setattr(merge_study, "score_clients", None)
    monkeypatch.setattr(shared, "fit_client", None)
    table.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    again = read_rows(study())
    assert extracted == [(["kfac"], "normalised")] * 5
    assert again[:-1] == rows[:-1]
    assert again[-1]["accuracy"] == rows[-1]["accuracy"]

    # With all rows there, nothing is even loaded.
    monkeypatch.setattr(shared, "load_images", None)
    assert read_rows(study()) == again


def test_variants_merge_the_same_clients(study, monkeypatch):
    study()
    monkeypatch.setattr(shared, "fit_client", None)
    rows = read_rows(study("--variants"))
    assert [row["method"] for row in rows] == [*NAMES, *VARIANTS]
    models = {row["method"]: row["nll"] for row in rows if row["method"].startswith("fedfisher")}
    assert len(set(models.values())) == len(models)
    assert "| fedfisher, power 0.25 | 0 |" in merge_table(rows)


def test_variants_with_the_default_choices_are_the_default(study, monkeypatch):
    default = METHODS["fedfisher"]
    chosen = {"power": 0.5, "output_transform": default.output_transform}
    spelled_out = merge_study.Merge("fedfisher", EXTRACTIONS["fedfisher"], chosen)
    monkeypatch.setitem(merge_study.MERGES, "spelled out", spelled_out)
    monkeypatch.setattr(merge_study, "VARIANTS", {"spelled out": spelled_out})
    rows = {row["method"]: row for row in read_rows(study("--variants"))}
    assert rows["spelled out"]["nll"] == rows["fedfisher"]["nll"]


def test_clients_with_batchnorm_send_statistics_although_they_were_tested_first(study, monkeypatch):
    batchnorm = dataclasses.replace(FEDERATION, model="resnet8_batchnorm")
    monkeypatch.setattr(merge_study, "MERGE_FEDERATIONS", {"development": [batchnorm]})
    monkeypatch.setattr(shared, "_EPOCHS", {"resnet8_batchnorm": 1})
    sent = []

    def merge(method, updates, *others):
        sent.extend((method, bool(update.header.normalized)) for update in updates)
        return shared_merge(method, updates, *others)

    shared_merge = merge_study.merge
    monkeypatch.setattr(merge_study, "merge", merge)
    rows = read_rows(study("--methods", "fedavg", "fedfisher"))
    assert [row["method"] for row in rows] == ["best client", "ensemble", "fedavg", "fedfisher"]
    assert set(sent) == {("fedavg", False), ("fedfisher", True)}


def test_updates_are_extracted_in_one_pass_for_each_fisher_type(monkeypatch):
    passes = []

    def extract(client, kinds, fisher, max_samples):
        passes.append((sorted(kinds), fisher, max_samples))
        return {}

    monkeypatch.setattr(merge_study, "extract", extract)
    merge_study.extract_updates([(None, None)], {how.extraction for how in VARIANTS.values()})
    assert passes == [(["kfac"], "exact", None), (["diagonal", "kfac"], "normalised", None)]


def test_labelled_samples_are_those_of_the_recipe(tmp_path):
    train = load_images("digits", tmp_path).train
    train = dataclasses.replace(train, augment=True)
    found = labelled_samples(train, 7)
    chosen = np.random.default_rng(7).choice(len(train), 500, replace=False)
    assert not found.augment
    assert torch.equal(found.images, train.images[torch.as_tensor(chosen)])
    assert torch.equal(found.labels, train.labels[torch.as_tensor(chosen)])


def test_cells_are_distinct_and_the_held_out_ones_new():
    sizes = {"development": 21, "seeds": 9, "earlier": 10, "held-out": 9, "normalised": 40}
    assert {name: len(federations) for name, federations in MERGE_FEDERATIONS.items()} == sizes
    assert all(len(set(found)) == len(found) for found in MERGE_FEDERATIONS.values())
    known = {each for name in sizes if name != "held-out" for each in MERGE_FEDERATIONS[name]}
    splits = {(each.dataset, each.partition_seed) for each in known}
    held_out = MERGE_FEDERATIONS["held-out"]
    assert not splits & {(each.dataset, each.partition_seed) for each in held_out}
    assert Federation("fashionmnist", "lenet", 0.3, 45, 1) in MERGE_FEDERATIONS["held-out"]
    assert Federation("imagefolder", "cnn", 0.2, 32, 1) in MERGE_FEDERATIONS["held-out"]


def _rows(model, alpha, split, *scores):
    federation = {"dataset": "any", "model": model, "alpha": alpha, "partition_seed": split}
    return [
        {
            **federation,
            "seed": "0",
            "method": method,
            "accuracy": str(accuracy),
            "nll": str(nll),
            "server_labels": "500" if method == "fedfisher_kfac" else "0",
            "server_seconds": "1.0",
        }
        for method, (accuracy, nll) in zip(COMPARED, scores, strict=True)
    ]


COMPARED = ["best client", "ensemble", "fedfisher_kfac", "fedfisher"]
ROWS = [
    *_rows("lenet", "0.1", "3", (60, 2.0), (72, 0.5), (69, 1.0), (70, 0.9)),
    *_rows("lenet", "0.1", "4", (61, 2.0), (70, 0.5), (76, 0.8), (74, 0.7)),
    *_rows("lenet", "0.05", "3", (50, 3.0), (58, 1.0), (54, 1.5), (60, 1.6)),
    *_rows("cnn", "0.1", "3", (30, 3.0), (50, 1.4), (40, 2.0), (44, 1.6)),
]


def test_table_groups_cells_by_alpha_and_network():
    lines = merge_table(ROWS).splitlines()
    header = "| method | server labels | lenet a0.05 | lenet a0.1 | cnn | lenet mean | NLL |"
    assert lines[0] == header
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert lines[2] == "| best client | 0 | 50.0 | 60.5 (60.0-61.0) | 30.0 | 57.00 | 2.50 |"
    assert lines[4] == "| fedfisher_kfac | 500 | 54.0 | 72.5 (69.0-76.0) | 40.0 | 66.33 | 1.32 |"


def test_summary_counts_the_cells_ahead_for_each_network():
    lines = merge_summary(ROWS).splitlines()
    assert lines[0] == (
        "| `fedfisher` against | lenet: points | ahead in | lower NLL in "
        "| cnn: points | ahead in | lower NLL in |"
    )
    assert lines[2] == "| `fedfisher_kfac` | +1.67 | 2 of 3 | 2 of 3 | +4.00 | 1 of 1 | 1 of 1 |"
    assert lines[3] == "| best client | +11.00 | 3 of 3 | 3 of 3 | +14.00 | 1 of 1 | 1 of 1 |"
    assert lines[4] == "| ensemble | +1.33 | 2 of 3 | 0 of 3 | -6.00 | 0 of 1 | 0 of 1 |"
    assert len(lines) == 5  # what a study left out is compared with nothing


def test_a_single_network_has_no_columns_of_others():
    lenet = [row for row in ROWS if row["model"] == "lenet"]
    assert "cnn" not in merge_table(lenet) + merge_summary(lenet)
    cnn = [row for row in ROWS if row["model"] == "cnn"]
    assert "lenet" not in merge_table(cnn) + merge_summary(cnn)


def test_a_method_without_a_cell_is_not_averaged_over_the_others():
    with pytest.raises(KeyError):
        merge_table(ROWS[:-1])
