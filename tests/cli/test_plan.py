"""``fedfisher plan``, run as a user runs it but for the process."""

from lightning_fedfisher.cli.main import main


def test_a_plan_needs_no_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "large_models.py").write_text(
        "from torch import nn\n"
        "def huge():\n"
        "    return nn.Sequential(nn.Linear(2**14 - 1, 64), nn.ReLU(), nn.Linear(64, 2**14))\n"
    )
    assert main(["plan", "large_models:huge", "--clients", "7"]) == 0
    told = capsys.readouterr().out
    for part in ("kfac curvature of 2 layers", "input_gram curvature", "diagonal curvature"):
        assert part in told
    assert told.count("for 7 clients") == 3
    assert "curvature='diagonal' 1.0" in told


def test_what_cannot_be_planned_is_refused(capsys):
    assert main(["plan", "torch.nn:ReLU"]) == 1
    assert "no parameters that are trained" in capsys.readouterr().err
    assert main(["plan", "helpers.federation:TinyClassifier", "--curvature", "hessian"]) == 1
    assert "curvature='hessian' is not one of" in capsys.readouterr().err
