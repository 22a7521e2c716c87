import json
import time
from types import SimpleNamespace

import pytest
from benchmarks.logging_benchmark import Stopwatch, main

QUICK = ["--dataset", "digits", "--model", "lenet", "--clients", "2", "--alpha", "1"]
QUICK += ["--epochs", "1", "--max-train-samples", "60", "--methods", "fedavg", "--resume"]


def test_every_moment_counts_once_and_all_is_put_back(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    place = SimpleNamespace(inner=lambda: next(clock), outer=lambda: place.inner())
    before = vars(place).copy()
    watch = Stopwatch()
    with watch.watching([(place, "inner"), (place, "outer")]):
        place.outer()
        assert watch.seconds == 2  # one of them passes inside
        place.inner()
        with pytest.raises(TypeError):
            place.inner("too much")
    assert watch.seconds == 2 + 2 + 1
    assert vars(place) == before


def test_runs_with_and_without_are_compared(tmp_path, capsys):
    output = tmp_path / "cost.json"
    main(["--repeats", "1", "--output", str(output), *QUICK])
    report = json.loads(output.read_text())
    (logged,), (silent,) = report["runs"]["offline"], report["runs"]["disabled"]
    assert 0 < logged["logging_seconds"] < logged["seconds"]
    assert silent["logging_seconds"] == pytest.approx(0, abs=0.2)
    for run in (logged, silent):
        assert 0 < run["page_seconds"] < run["seconds"]
    assert str(tmp_path) not in output.read_text()
    share = 100 * logged["logging_seconds"] / logged["seconds"]
    assert f"| in logging calls, of a run with W&B | {share:.1f} |" in capsys.readouterr().out
