"""The image recipe end to end on embedded digits and a network without pre-trained weights."""

import dataclasses
import functools
import json
import math

import pretrained_image
import pytest
import torch
from safetensors.torch import load_file
from simulation.pretrained import Federation, run
from simulation.pretrained_setting import Flags, Task

SMALL = [
    *("--dataset", "digits", "--model", "resnet18", "--weights", "none", "--image-size", "32"),
    *("--clients", "2", "--alpha", "1", "--epochs", "1", "--batch-size", "16"),
    *("--max-train-samples", "60", "--max-test-samples", "40", "--unlabelled-samples", "50"),
]
SHOWN = ("closed_form_head", "fedavg", "regmean", "fedavg_unlabelled", "head_first_fedavg", "ties")


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """A finished federation, and its results."""
    output = tmp_path_factory.mktemp("federation")
    pretrained_image.main([*SMALL, "--methods", *SHOWN, "--output-dir", str(output)])
    return output, json.loads((output / "results.json").read_text())


def test_results_have_the_form_of_the_other_recipes(federation):
    _, results = federation
    assert list(results["methods"]) == list(SHOWN)
    unlabelled = results["methods"]["fedavg_unlabelled"]
    for row in results["methods"].values():
        assert 0 <= row["accuracy"] <= 100
        assert math.isfinite(row["nll"])
        assert row["server_labels"] == 0
        assert row["unlabelled_samples"] == (50 if row is unlabelled else 0)
        assert row["upload_bytes"] < 1.01 * row["fedavg_bytes"]
    assert sum(client["num_samples"] for client in results["clients"]) == 60
    accuracies = [client["accuracy"] for client in results["clients"]]
    assert results["best_client"]["accuracy"] == max(accuracies)
    assert {"dataset": "digits", "model": "resnet18"}.items() <= results["config"].items()


def test_the_first_model_is_written(federation):
    output, results = federation
    state = load_file(output / "merged.safetensors")
    assert state["fc.weight"].shape == (10, 512)
    assert (output / "report.html").stat().st_size > 10_000
    assert max(row["accuracy"] for row in results["methods"].values()) > 20  # of random features


def test_a_finished_federation_is_kept(federation, monkeypatch, capsys):
    output, results = federation
    monkeypatch.setattr(torch.Tensor, "backward", None)  # nothing is trained again
    flags = [*SMALL, "--methods", *SHOWN, "--output-dir", str(output)]
    with pytest.raises(SystemExit, match="add --resume"):
        pretrained_image.main(flags)
    with pytest.raises(SystemExit, match="begun with another alpha, image_size"):
        pretrained_image.main([*flags, "--resume", "--image-size", "16", "--alpha", "2"])
    pretrained_image.main([*flags, "--resume"])
    again = json.loads((output / "results.json").read_text())
    for method, row in results["methods"].items():
        assert again["methods"][method]["accuracy"] == row["accuracy"]
    assert "epochs at" not in capsys.readouterr().out


def test_heads_alone_train_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", None)
    heads = ["random_features_head", "closed_form_head", "layer_features_head"]
    flags = [*SMALL, "--random-features", "30", "--output-dir", str(tmp_path)]
    pretrained_image.main([*flags, "--methods", *heads])
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["methods"]) == heads
    assert results["best_client"] == {}
    state = load_file(tmp_path / "merged.safetensors")
    assert state["fc.0.weight"].shape == (30, 512)
    assert state["fc.1.weight"].shape == (10, 542)


def test_a_network_without_blocks_is_told(tmp_path):
    flags = [*SMALL, "--methods", "layer_features_head"]
    with pytest.raises(SystemExit, match="name the layers to take, or leave layer_features_head"):
        pretrained_image.main([*flags, "--model", "vgg11", "--output-dir", str(tmp_path)])


def test_all_methods_are_offered_and_no_other():
    parser, offered = pretrained_image.make_parser(), pretrained_image.IMAGE_METHODS
    assert parser.parse_args(["--methods", *offered]).methods == list(offered)
    with pytest.raises(SystemExit):
        parser.parse_args(["--methods", "fedfisher_kfac"])


def test_the_servers_images_are_no_clients():
    flags = [*SMALL, "--methods", "fedavg_unlabelled"]
    task = pretrained_image.image_task(pretrained_image.make_parser().parse_args(flags))
    assert task.unlabelled.shape == (50, 3, 32, 32)
    clients = {image.numpy().tobytes() for image in task.train.tensors[0]}
    assert not clients & {image.numpy().tobytes() for image in task.unlabelled}
    assert len(clients) == 60
    with pytest.raises(SystemExit, match=r"are left for the server, which cannot have 100000"):
        pretrained_image.main([*flags, "--unlabelled-samples", "100000"])


def test_weights_with_two_names_are_those_of_the_peer(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(8, 8)
            self.last = torch.nn.Linear(8, 8)
            self.last.weight = self.first.weight

        def forward(self, x):
            return self.last(self.first(x).relu())

    torch.manual_seed(0)
    inputs = torch.utils.data.TensorDataset(torch.randn(40, 8), torch.arange(40) % 8)
    make = functools.partial(torch.optim.SGD, momentum=0.9)
    task = Task(
        "made-up", "tied", "", inputs, inputs, 8, lambda _: Tied(), make, 0.1, 0.1, 1, "", {}
    )
    flags = Flags(clients=2, alpha=10.0, methods=("fedavg", "ties"), output_dir=tmp_path)
    run(task, flags)
    federation = Federation(task, dataclasses.replace(flags, resume=True))
    start = Tied()
    paths = [tmp_path / f"fine-tuned/updates/client-{k}/identity.safetensors" for k in (0, 1)]
    average, peer = (federation.merged(method, paths, start)[1] for method in ("fedavg", "ties"))
    assert torch.equal(peer["first.weight"], peer["last.weight"])
    assert not torch.equal(peer["last.weight"], average["last.weight"])


def test_a_network_that_is_unknown_is_told_at_once():
    with pytest.raises((SystemExit, RuntimeError), match=r"nowhere|Unknown model"):
        pretrained_image.main(["--dataset", "digits", "--model", "nowhere"])
