"""``fedfisher verify``, run as a user runs it but for the process."""

from helpers.federation import tiny_model

from lightning_fedfisher import ClientUpdate
from lightning_fedfisher.cli.main import main


def test_verify_accepts_what_is_good(folder, capsys):
    assert main(["verify", "updates/*.safetensors", "--model", "factories:fitting"]) == 0
    assert "10 of 10 updates are usable" in capsys.readouterr().out


def test_verify_names_what_is_bad_and_why(folder, capsys, damage):
    damage(folder / "updates/client-4.safetensors")
    (folder / "updates/client-5.safetensors").write_bytes(b"nothing")
    files = ["updates/*.safetensors", "missing.safetensors"]
    assert main(["verify", *files]) == 1
    told = capsys.readouterr().out
    for part in (
        "REFUSED  updates/client-4.safetensors",
        "parameters/network.7.weight does not match its digest",
        "REFUSED  updates/client-5.safetensors",
        "truncated or damaged",
        "REFUSED  missing.safetensors",
        "8 of 11 updates are usable",
    ):
        assert part in told


def test_verify_checks_against_a_model(folder, capsys):
    assert main(["verify", "updates/client-0.safetensors", "--model", "factories:foreign"]) == 1
    assert "network.0.bias is absent in it" in capsys.readouterr().out


def test_verify_reports_clients_that_weigh_too_much(folder, capsys):
    path = folder / "updates/client-2.safetensors"
    update = ClientUpdate.open(path)
    blocks = {
        name: type(block)(1e6 * block.row_factor, block.column_factor)
        for name, block in update.blocks.items()
    }
    model = tiny_model()
    model.load_state_dict(update.parameters)
    ClientUpdate.from_model(model, update.header, blocks).save(path)
    assert main(["verify", "updates/*.safetensors"]) == 0
    told = capsys.readouterr().err.splitlines()
    (line,) = [line for line in told if "client-2.safetensors has" in line]
    assert "times the information in" in line
