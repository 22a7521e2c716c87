from dataclasses import replace

import pytest
import torch

from lightning_fedfisher.results import FederationRecord
from lightning_fedfisher.results.from_merge import describe_federation, describe_merge


def test_a_merge_is_recorded_as_it_went(result, updates):
    record = describe_merge(result, seconds=2.5)
    assert record.method == result.method == "fedfisher"
    assert record.layers == [layer.name for layer in updates[0].layers]
    assert record.history == [dict(entry) for entry in result.history]
    assert record.history[-1].keys() >= {"iterations", "objective", "residual"}
    assert record.upload_bytes == round(sum(u.upload_bytes for u in updates) / len(updates))
    assert record.fedavg_bytes == updates[0].fedavg_bytes
    assert record.server_seconds == 2.5
    assert record.server_labels == 0
    assert record.score is record.client_seconds is None
    assert describe_merge(result).server_seconds == result.seconds > 0


def test_distances_and_influence_have_a_row_a_layer_and_a_column_a_client(result, updates):
    record = describe_merge(result)
    shape = (len(updates[0].layers), len(updates))
    assert torch.tensor(record.distances).shape == torch.tensor(record.influence).shape == shape
    assert torch.equal(
        torch.tensor(record.distances, dtype=result.distances.dtype), result.distances
    )
    influence = torch.tensor(record.influence, dtype=result.influence.dtype)
    assert torch.equal(influence, result.influence.max(dim=2).values)


@pytest.mark.parametrize("labels", [0, 500])
def test_labels_that_the_server_used_are_counted(result, labels):
    assert describe_merge(replace(result, server_labels=labels)).server_labels == labels


def test_a_federation_is_its_clients_and_its_merge(result, updates, tmp_path):
    config = {"method": "fedfisher", "max_influence": 5.0}
    record = describe_federation(result, "three wards", config)
    assert record.title == "three wards"
    assert [(c.name, c.num_samples, c.upload_bytes) for c in record.clients] == [
        (f"client-{index}", 20 + 10 * index, update.upload_bytes)
        for index, update in enumerate(updates)
    ]
    assert record.merges == [describe_merge(result)]
    assert record.config == config
    assert record.environment.keys() >= {"date", "torch", "lightning-fedfisher"}
    assert record.best_client is record.ensemble is None
    record.save(tmp_path / "record.json")
    assert FederationRecord.load(tmp_path) == record
