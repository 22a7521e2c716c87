"""What a merge gives: solved or not, and what each client brought into it."""

from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch
from helpers.merging import small_classifier, small_data, update_of

from lightning_fedfisher import ClientUpdate
from lightning_fedfisher.merge.result import LayerResult, MergeResult, contributions

LAYERS = (
    LayerResult("0", (4, 6), 7, 0.5, 1e-5, solved=True),
    LayerResult("2", (3, 5), 9, 0.25, 1e-4, solved=True),
)


def _result(layers=LAYERS, clients=()):
    return MergeResult(
        state_dict={"0.weight": torch.full((4, 5), 0.125)},
        method="fedfisher",
        max_influence=3.0,
        layers=layers,
        clients=clients,
        distances=torch.zeros(len(layers), len(clients)),
        influence=torch.zeros(len(layers), len(clients), 3),
        history=(),
        warnings=(),
        server_labels=0,
        curvature="kfac",
        fisher="normalised",
        likelihood="categorical",
        model_fingerprint="",
        fedavg_bytes=0,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Updates of three clients, opened from files of one name."""
    root, opened = tmp_path_factory.mktemp("files"), []
    for seed, place in enumerate(("berlin", "bern", "basel")):
        update = update_of(small_classifier(seed=seed), small_data(seed), "kfac", 10 * (seed + 1))
        (root / place).mkdir()
        opened.append(ClientUpdate.open(update.save(root / place / "update.safetensors")))
    return opened


def test_a_merge_is_solved_if_every_layer_is():
    assert _result().solved
    for index in range(2):
        layers = list(LAYERS)
        layers[index] = replace(layers[index], solved=False)
        assert not _result(tuple(layers)).solved


def test_contributions_are_those_of_the_updates_in_their_order(files):
    found = contributions(files, [1.0, 2.0, 5.0])
    assert [client.weight for client in found] == [0.125, 0.25, 0.625]
    assert [client.num_samples for client in found] == [10, 20, 30]
    for client, update in zip(found, files, strict=True):
        assert client.source == update.source
        assert client.digest == update.digest
        assert client.upload_bytes == Path(update.source).stat().st_size


@pytest.mark.parametrize("scale", [1e-12, 0.1, 1, 3, 1e12])
def test_weights_of_any_sum_become_weights_that_sum_to_one(files, scale):
    found = contributions(files, [scale * n for n in (3, 7, 11)])
    assert sum(client.weight for client in found) == pytest.approx(1, abs=1e-15)
    assert [client.weight for client in found] == pytest.approx([3 / 21, 7 / 21, 11 / 21])


def test_clients_are_named_by_what_tells_their_files_apart(files):
    names = [client.name for client in contributions(files, [1, 1, 1])]
    assert names == ["berlin", "bern", "basel"]
    again = [client.name for client in contributions([files[1], files[0], files[1]], [1, 1, 1])]
    assert again == ["client-0", files[0].source, "client-2"]


def test_results_stay_as_they_are():
    (client,) = contributions([update_of(small_classifier(), small_data())], [4])
    assert client.weight == 1
    for thing, field in ((client, "weight"), (LAYERS[0], "solved"), (_result(), "method")):
        with pytest.raises(FrozenInstanceError):
            setattr(thing, field, None)


def test_a_result_is_shown_without_the_model():
    assert "0.125" not in repr(_result())
    assert "LayerResult(name='0', shape=(4, 6), iterations=7" in repr(_result())
