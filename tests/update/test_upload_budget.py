import pytest
from helpers.federation import quiet_trainer, tiny_loader, tiny_model
from helpers.networks import extract, make_data
from torch import nn

from lightning_fedfisher import BudgetError, ClientUpdate, FedFisherCallback
from lightning_fedfisher.update.upload_budget import budget_bytes


@pytest.mark.parametrize("budget", [0, -1, float("nan"), float("inf")])
def test_a_budget_is_a_positive_number(budget):
    with pytest.raises(ValueError, match="upload_budget must be greater than 0"):
        budget_bytes(budget, 10)


def test_every_file_may_take_sixteen_kibibytes():
    assert budget_bytes(0.1, 100) == 2**14
    assert budget_bytes(0.5, 2**20) == 2**19


def test_a_hopeless_budget_is_refused_before_anything_is_compressed():
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 600), nn.Tanh(), nn.Linear(600, 600), nn.Linear(600, 3)
    )
    extracted = extract(model.double(), make_data((4, 4), 5))
    update = ClientUpdate.from_model(model, extracted.header(), extracted.blocks)
    for budget in (1e-3, 0.01):
        with pytest.raises(BudgetError, match=r"does not fit into upload_budget=.* Raise it"):
            update.require_room(budget)
        with pytest.raises(BudgetError):  # and it would have been
            update.compressed(budget)
    update.require_room(0.1)
    update.require_room(100.0)


def test_a_client_hears_of_it_before_the_training(tmp_path):
    trained, model = [], tiny_model()
    model.network.append(nn.Linear(3, 600))
    model.network.append(nn.Linear(600, 600))
    model.network.append(nn.Linear(600, 3))
    model.on_train_batch_end = lambda *_: trained.append(1)
    callback = FedFisherCallback(upload_budget=1e-6)
    with pytest.raises(BudgetError, match="upload_budget=1e-06"):
        quiet_trainer(tmp_path, callbacks=[callback]).fit(model, tiny_loader())
    assert not trained
