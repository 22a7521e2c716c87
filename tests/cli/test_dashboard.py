"""``fedfisher dashboard``, with a stand-in for W&B's server."""

import json
import sys
from types import SimpleNamespace

import pytest
import wandb

from lightning_fedfisher.cli.main import main
from lightning_fedfisher.tracking.wandb_workspace import planned

NAMES = ("a team", "x-rays", "clinics 2026")
COMMAND = ["dashboard", "--entity", NAMES[0], "--project", NAMES[1], "--group", NAMES[2]]


@pytest.fixture(scope="module")
def plan():
    return planned(*NAMES)


class Server:
    """W&B's, as far as saving needs it."""

    def __init__(self, known=("x-rays",)):
        self.known, self.saved = known, []
        self._service_api = self
        self.app_url = "https://wandb.example/"

    def projects(self, entity):
        return [SimpleNamespace(name=name) for name in self.known]

    def execute_graphql(self, query, variables):
        if "upsertView" not in query:
            known = variables["projectName"] in self.known
            return {"project": {"internalId": "7"} if known else None}
        self.saved.append(variables)
        name = variables["name"]
        view = {"id": f"id{len(self.saved)}", "name": name, "spec": variables["spec"]}
        return {"upsertView": {"view": view, "inserted": True}}


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setattr(wandb, "Api", lambda: server)
    return server


def _without_ids(value):
    if isinstance(value, dict):
        return {k: _without_ids(v) for k, v in value.items() if k not in ("id", "__id__")}
    return [_without_ids(item) for item in value] if isinstance(value, list) else value


def test_both_are_saved_as_planned_and_their_addresses_told(server, plan, capsys):
    assert main(COMMAND) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("https://wandb.example/a%20team/x-rays?nw=")
    assert second == "https://wandb.example/a%20team/x-rays/reports/Federation-clinics-2026--id2"
    for sent, what in zip(server.saved, ("workspace", "report"), strict=True):
        assert (sent["entityName"], sent["projectName"]) == NAMES[:2]
        assert sent["displayName"] == plan[what]["displayName"] == "Federation clinics 2026"
        assert _without_ids(json.loads(sent["spec"])) == plan[what]["spec"]


def test_a_dry_run_prints_both_and_needs_no_network(plan, capsys, monkeypatch):
    monkeypatch.setattr(wandb, "Api", None)
    assert main([*COMMAND, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out) == plan


def _refused(error):
    def api():
        raise error

    return api


@pytest.mark.parametrize(
    ("api", "told"),
    [
        (
            _refused(wandb.errors.UsageError("No API key configured.\n Use x")),
            "not logged in to W&B",
        ),
        (_refused(wandb.errors.CommError("no route\n\nto host")), "no route to host"),
        (_refused(ConnectionError("refused")), "refused"),
        (_refused(Exception()), "did not take the workspace: Exception"),
        (lambda: Server(known=()), "did not take the report"),
    ],
)
def test_what_w_and_b_refuses_is_told_in_one_line(api, told, monkeypatch, capsys):
    monkeypatch.setattr(wandb, "Api", api)
    monkeypatch.setattr(wandb, "termlog", lambda *_: None)
    assert main(COMMAND) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert told in line


def test_without_the_extra_the_command_tells_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    monkeypatch.delitem(sys.modules, "lightning_fedfisher.tracking.wandb_workspace")
    assert main([*COMMAND, "--dry-run"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'lightning-fedfisher[dashboard]'" in line


@pytest.mark.parametrize("missing", ["--entity", "--project", "--group"])
def test_all_three_names_are_needed(missing):
    at = COMMAND.index(missing)
    with pytest.raises(SystemExit, match="2"):
        main(COMMAND[:at] + COMMAND[at + 2 :])
