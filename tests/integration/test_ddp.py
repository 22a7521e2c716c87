"""Several processes: they extract what one process extracts, and merge to what one merges to.

One run of `ddp_cases.py` does all of it; the tests look at what its processes wrote.
"""

import json
from pathlib import Path

import pytest
import torch
from helpers.ddp import run_ddp
from helpers.federation import NormedClassifier, tiny_data, tiny_loader, tiny_model
from helpers.merging import assert_same, merge, update_of, updates_by_method
from torch import nn
from torch.utils.data import TensorDataset

from lightning_fedfisher import ClientUpdate, extract_curvature

SCRIPT = Path(__file__).with_name("ddp_cases.py")


def _of_one_layer():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(12, 4), torch.arange(12) % 3)
    return [update_of(nn.Linear(4, 3), data, "kfac") for _ in range(2)]


def _apart(seed, spread=0.5):
    """A client of a convolutional network that went its own way from a common start."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)),
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.ReLU(),
        nn.Linear(5, 6),
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += spread * float(parameter.square().mean().sqrt()) * noise
    x = torch.randn(100 + 50 * seed, 36, generator=generator) + 0.2 * seed
    y = torch.randint(0, 6, (len(x),), generator=generator)
    return update_of(model, TensorDataset(x, y), "kfac")


MERGES = {  # of trained clients: method, processes, memory budget
    "two": ("fedfisher", 2, 2**30),
    "three": ("fedfisher", 3, 2**30),
    "three, kfac": ("fedfisher_kfac", 3, 2**30),
    "two, on disk": ("fedfisher", 2, 0),
}


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """The clients whose updates each case merges."""
    methods = {method for method, _, _ in MERGES.values()}
    trained = updates_by_method(tmp_path_factory.mktemp("trained"), sorted(methods))
    with torch.random.fork_rng():
        apart = [_apart(seed) for seed in range(3)]
        small = _of_one_layer()
        normed = [update_of(NormedClassifier(), tiny_data(seed), "kfac") for seed in range(3)]
    return {
        "one layer": small,
        "aligned": apart,
        "statistics": normed,
        "failing": apart,
        **{case: trained[method] for case, (method, _, _) in MERGES.items()},
    }


@pytest.fixture(scope="module")
def together(clients, tmp_path_factory):
    """Where the processes have written what they found, a folder for each case."""
    root = tmp_path_factory.mktemp("together")
    cases = {  # by the number of processes
        2: {
            "extract": ["extract", {}],
            "buffers": ["extract_with_buffers", {}],
            "one layer": ["merge", {"validates": False}],
            "aligned": ["merge", {"validates": False}],
            "statistics": ["merge", {"normed": True}],
            "torn": ["fail_to_extract", {}],
            "failing": ["fail_to_merge", {}],
        },
        3: {},
    }
    for case, (method, processes, budget) in MERGES.items():
        cases[processes][case] = ["merge", {"method": method, "budget": budget}]
    for case, updates in clients.items():
        for index, update in enumerate(updates):
            update.save(root / case / "updates" / f"{index}.safetensors")
    for some in cases.values():
        some |= {case: [what, str(root / case), options] for case, (what, options) in some.items()}
    (root / "cases.json").write_text(json.dumps(cases))
    run_ddp(SCRIPT, root / "cases.json", timeout=240)
    return root


def test_two_processes_extract_with_the_buffers_that_are_sent(together):
    update = ClientUpdate.open(together / "buffers" / "update.safetensors")
    model = NormedClassifier()
    model.load_state_dict(update.parameters | update.buffers)
    alone = extract_curvature(model, tiny_loader(samples=21), "diagonal", fisher="exact")
    for name, block in update.blocks.items():
        torch.testing.assert_close(block.diagonal(), alone.blocks[name].diagonal())


def test_two_processes_see_an_odd_number_of_samples_once_each(together):
    for path in (together / "extract").glob("*.safetensors"):
        kind, fisher = path.stem.split("-")
        update = ClientUpdate.open(path)
        assert update.num_samples == update.header.curvature_samples == 21
        alone = extract_curvature(tiny_model(), tiny_loader(samples=21), kind, fisher=fisher)
        for name, block in update.blocks.items():
            for part, tensor in block.tensors().items():
                torch.testing.assert_close(tensor, alone.blocks[name].tensors()[part])
    assert len(list((together / "extract").glob("*.safetensors"))) == 3


def test_more_processes_than_layers_finish(together, clients, tmp_path):
    alone = merge(clients["one layer"], tmp_path)
    found = torch.load(together / "one layer" / "merged.pt", weights_only=True)
    assert_same(found, alone.merged_state_dict(), rtol=1e-5, atol=1e-6)


def test_processes_do_not_change_an_aligned_merge(together, clients, tmp_path):
    assert {*clients["aligned"][0].header.fed_by} == {"4", "7", "9"}
    found = torch.load(together / "aligned" / "merged.pt", weights_only=True)
    alone = merge(clients["aligned"], tmp_path)
    assert_same(found, alone.merged_state_dict(), rtol=1e-5, atol=1e-6)


def test_processes_do_not_change_statistics_of_samples(together, clients, tmp_path):
    options = {"statistics_loader": tiny_loader(seed=60, samples=30, shuffle=False)}
    alone = merge(clients["statistics"], tmp_path, model=NormedClassifier(), **options)
    found = torch.load(together / "statistics" / "merged.pt", weights_only=True)
    assert alone.result.unlabelled_samples == 30
    assert_same(found, alone.merged_state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", MERGES)
def test_processes_do_not_change_the_result(together, clients, case, tmp_path):
    method, folder = MERGES[case][0], together / case
    loader = tiny_loader(seed=50, samples=40, shuffle=False)
    alone = merge(clients[case], tmp_path, loader, method=method, model=tiny_model())
    found = torch.load(folder / "merged.pt", weights_only=True)
    assert_same(found, alone.merged_state_dict(), rtol=1e-5, atol=1e-6)
    influence, distances = torch.load(folder / "clients.pt", weights_only=True)
    assert influence.any(dim=2).all()
    assert distances.all()
    torch.testing.assert_close(influence, alone.influence, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(distances, alone.distances, rtol=1e-3, atol=1e-6)
    history = json.loads((folder / "history.json").read_text())
    for ours, theirs in zip(alone.history, history, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3)


def _raised(folder):
    return [(folder / f"rank-{rank}.txt").read_text().splitlines() for rank in range(2)]


def test_samples_that_one_rank_cannot_read_are_told_on_all(together):
    zero, one = _raised(together / "torn")
    assert len(zero) == len(one) == 2
    for told, own in zip(zero, one, strict=True):
        assert own.startswith("OSError: sample ")
        assert told == f"RankError: rank 1 failed: {own}"
    assert not (together / "torn" / "update.safetensors").exists()


def test_a_layer_that_one_rank_cannot_solve_is_told_on_all(together):
    (zero,), (one,) = _raised(together / "failing")
    assert one.startswith("RuntimeError: ")
    assert zero == f"RankError: rank 1 failed: {one}"
    assert list((together / "failing" / "offloaded").iterdir()) == []
