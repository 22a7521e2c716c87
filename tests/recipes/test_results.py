"""The figures in the READMEs are those of the recorded results."""

import json
from pathlib import Path

import pytest
from simulation.rows import read_rows
from simulation.tables.benchmarks import (
    benchmark_table,
    extraction_summary,
    fuzz_table,
    large_models_table,
    large_table,
    logging_table,
    merge_benchmark_table,
    real_models_table,
)
from simulation.tables.runs import costs_table, results_table, rounds_table, run_title
from simulation.tables.studies import (
    compression_table,
    hostile_table,
    merge_summary,
    merge_table,
    positions_table,
    study_table,
)
from studies import tables

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "recipes" / "results"


def readme(folder=""):
    """The README of the recipes, or of one of their folders."""
    return (ROOT / "recipes" / folder / "README.md").read_text()


def load(*names):
    return [json.loads((RESULTS / f"{name}.json").read_text()) for name in names]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_recorded_results_tell_date_and_hardware(path):
    report = json.loads(path.read_text())
    assert set(report["environment"]) == {"date", "hardware", "python", "torch", "lightning"}
    assert f"`{path.stem}`" in readme("results")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.csv")), ids=lambda path: path.stem)
def test_recorded_studies_tell_date_and_hardware(path):
    assert path.read_text().startswith("# 20")
    assert f"`{path.stem}`" in readme("results")


@pytest.mark.parametrize(
    "path",
    sorted(path for path in RESULTS.iterdir() if path.suffix != ".md"),
    ids=lambda path: path.name,
)
def test_every_recorded_file_is_printed_as_a_table_of_some_readme(path, capsys):
    tables.main([str(path)])
    printed = capsys.readouterr().out.split("\n\n")
    shown = "".join(map(readme, ("", "results", "studies", "benchmarks", "fuzzing")))
    shown += (ROOT / "README.md").read_text()
    found = [part.strip() for part in printed if part.strip().startswith("|")]
    assert found
    titled = [part for part in found if part in shown]
    # Further training seeds of a federation are shown in one table with the first.
    assert titled or path.stem.startswith("fashionmnist-lenet")


def test_titles_tell_what_is_not_usual():
    config = {"dataset": "d", "model": "m", "alpha": 0.1, "partition_seed": 3, "seed": 0}
    assert run_title(config) == "d, m, alpha 0.1, p3 s0"
    assert run_title(config | {"clients": 20}) == "d, m, alpha 0.1, p3 s0, 20 clients"
    options = {"options": {"classes": "77"}, "max_train_samples": 3000, "clients": 1}
    title = run_title(config | options)
    assert title == "d (77 classes, 3,000 samples), m, in one place, p3 s0"
    images = {"options": {"image_size": "64"}, "max_train_samples": None, "clients": 5}
    assert run_title(config | images) == "d, m, alpha 0.1, p3 s0"


def test_heads_that_train_nothing_have_no_clients_to_show():
    config = {"dataset": "d", "model": "m", "alpha": 0.1, "partition_seed": 3, "seed": 0}
    row = {"accuracy": 60.0, "server_labels": 0}
    heads = {"config": config, "best_client": {}, "ensemble": {}, "methods": {"head": row}}
    tuned = heads | {"best_client": row, "ensemble": row}
    assert "client" not in results_table([heads])
    assert "| best single client |  |  | 60.0 |" in results_table([heads, tuned])


def test_readme_shows_the_recorded_accuracies():
    runs = load("fashionmnist-lenet-a0.1-p3-s0", "fashionmnist-lenet-a0.07-p11-s7", "cifar10-cnn")
    table = results_table(runs)
    assert table in (ROOT / "README.md").read_text()


def test_recipes_readme_shows_three_seeds():
    seeds = load(*(f"fashionmnist-lenet-a0.1-p3-s{seed}" for seed in range(3)))
    assert results_table(seeds, mean=True) in readme()


def test_readmes_show_pre_trained_networks():
    images, texts = "cifar10-efficientnet-lite0", "banking77-77-minilm"
    heads = [f"{name}-heads" for name in (texts, images, "digits-resnet18")]
    assert results_table(load(*heads)) in (ROOT / "README.md").read_text()
    cells = [f"{images}-a{alpha}-p3-s0" for alpha in ("0.1", "0.3")]
    assert results_table(load(*cells, f"{images}-one-place")) in readme()
    cells = [f"{texts}-{cell}" for cell in ("a0.1-p3-s0", "a0.1-p3-s1", "a0.5-p3-s0", "one-place")]
    assert results_table(load("banking77-minilm-a0.1-p3-s0", *cells)) in readme()
    cells = ("a0.1-p3-s0", "a0.1-p3-s1", "a0.1-p3-s2", "a0.5-p3-s0", "a0.1-p3-s0-c20")
    assert results_table(load(*(f"banking77-minilm-{cell}" for cell in cells))) in readme()
    normed = load(*(f"digits-resnet18-a0.1-p{seed}-s0" for seed in (3, 4)))
    assert results_table(normed) in readme()


def test_results_readme_shows_all_seeds_of_the_pre_trained_images():
    paths = sorted(RESULTS.glob("cifar10-efficientnet-lite0-a*.json"))
    assert results_table(load(*(path.stem for path in paths))) in readme("results")


def test_results_readme_shows_what_the_recorded_runs_cost():
    for name in ("fashionmnist-lenet-a0.1-p3-s0", "cifar10-cnn", "cifar10-resnet18"):
        assert costs_table(*load(name)) in readme("results")


@pytest.mark.parametrize("federations", ["development", "held_out"])
def test_studies_readme_shows_the_curvature_studies(federations):
    path = RESULTS / f"curvature_study_{federations}.csv"
    assert path.read_text().startswith("# 20")  # the date, then the hardware
    assert study_table(read_rows(path)) in readme("studies")


def test_results_readme_shows_several_rounds_and_a_start_from_given_weights():
    text = readme("results")
    rounds, init = load(
        "fashionmnist-lenet-a0.1-p3-s0-rounds", "fashionmnist-lenet-a0.07-p11-s7-init"
    )
    assert rounds_table(rounds) in text
    assert results_table([init]) in text


@pytest.mark.parametrize(
    "federations", ["development", "seeds", "held_out", "earlier", "variants", "normalised"]
)
def test_studies_readme_shows_the_merge_studies(federations):
    path = RESULTS / f"merge_study_{federations}.csv"
    assert path.read_text().startswith("# 20")
    rows = read_rows(path)
    text = readme("studies")
    assert merge_table(rows) in text
    if federations not in ("seeds", "variants"):
        assert merge_summary(rows) in text


def test_readmes_show_what_a_hostile_client_does():
    table = hostile_table(read_rows(RESULTS / "hostile_study.csv"))
    assert table in readme("studies")
    assert table in (ROOT / "README.md").read_text()


def test_fuzzing_readme_shows_what_became_of_mutated_files():
    (report,) = load("fuzz_updates")
    assert report["config"]["files"] >= 200_000
    assert report["crashes"] == []
    assert fuzz_table(report) in readme("fuzzing")
    assert f"{report['config']['files']:,} mutated files" in (ROOT / "README.md").read_text()


def test_benchmarks_readme_shows_what_logging_costs():
    (report,) = load("logging_cost")
    assert logging_table(report) in readme("benchmarks")


@pytest.mark.parametrize(
    "name", ["compression_study", "compression_study_held_out", "compression_study_resnet18"]
)
def test_studies_readme_shows_the_compression_study(name):
    path = RESULTS / f"{name}.csv"
    assert path.read_text().startswith("# 20")
    assert compression_table(read_rows(path)) in readme("studies")


def test_studies_readme_shows_the_positions_study():
    path = RESULTS / "positions_study.csv"
    assert path.read_text().startswith("# 20")
    assert positions_table(read_rows(path)) in readme("studies")


def test_readme_shows_the_merges_no_choice_was_made_on():
    rows = read_rows(RESULTS / "merge_study_held_out.csv")
    assert merge_summary(rows) in (ROOT / "README.md").read_text()


def test_readmes_show_the_extraction_benchmarks():
    reports = load("extraction_lenet", "extraction_cnn")
    text = readme("benchmarks")
    for report in reports:
        assert benchmark_table(report) in text
    assert large_table(*load("extraction_resnet18")) in text
    assert extraction_summary(reports) in text
    assert extraction_summary(reports) in (ROOT / "README.md").read_text()


def test_benchmarks_readme_shows_what_real_models_cost():
    (report,) = load("real_models")
    assert real_models_table(report) in readme("benchmarks")


def test_benchmarks_readme_shows_what_large_models_take():
    (report,) = load("large_models")
    for table in large_models_table(report).split("\n\n"):
        assert table in readme("benchmarks")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("merge_*.json")), ids=lambda path: path.stem)
def test_benchmarks_readme_shows_the_merge_benchmarks(path):
    text = readme("benchmarks")
    report = json.loads(path.read_text())
    assert merge_benchmark_table(report) in text
    if "times_faster" in report:
        assert f"{report['times_faster']:.1f} times" in text
