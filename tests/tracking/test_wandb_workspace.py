"""W&B dashboards, read in the form in which they would be sent.

After a change that is meant, `RENEW_SNAPSHOTS=1 pytest tests/tracking/test_wandb_workspace.py`
writes the snapshot anew; its diff is what W&B would see of the change.
"""

import json
import os
import re
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from helpers.federation import quiet_trainer, tiny_loader, tiny_model
from helpers.records import federation
from lightning.pytorch.loggers.logger import DummyLogger

import lightning_fedfisher
from lightning_fedfisher import FedFisherCallback, FisherMergeModule
from lightning_fedfisher.cli import main as cli
from lightning_fedfisher.tracking import log_federation
from lightning_fedfisher.tracking.client import _log_curvature
from lightning_fedfisher.tracking.wandb_workspace import planned, report, workspace

SNAPSHOT = Path(__file__).with_name("snapshots") / "dashboard.json"
NAMES = ("a team", "x-rays", "clinics 2026")


@pytest.fixture(scope="module")
def plan():
    return planned(*NAMES)


def _panels(plan):
    """The panels of each section of the workspace, then of each grid of the report."""
    bank = plan["workspace"]["spec"]["section"]["panelBankConfig"]
    yield from (section["panels"] for section in bank["sections"])
    for grid in _grids(plan):
        yield grid["panelBankSectionConfig"]["panels"]


def _grids(plan):
    blocks = plan["report"]["spec"]["blocks"]
    return [block["metadata"] for block in blocks if block["type"] == "panel-grid"]


def _of_type(plan, view):
    found = [panel for panels in _panels(plan) for panel in panels if panel["viewType"] == view]
    assert found
    return [panel["config"] for panel in found]


def _patterns(plan):
    return {config["metricRegex"] for config in _of_type(plan, "Run History Line Plot")}


def _run_sets(plan):
    return [
        *plan["workspace"]["spec"]["section"]["runSets"],
        *(runs for grid in _grids(plan) for runs in grid["runSets"]),
    ]


def test_what_is_sent_is_what_was_sent_before(plan):
    installed = version("wandb-workspaces")
    if os.environ.get("RENEW_SNAPSHOTS"):
        SNAPSHOT.parent.mkdir(exist_ok=True)
        text = json.dumps({"wandb-workspaces": installed, **plan}, indent=1)
        SNAPSHOT.write_text(f"{text}\n")
    before = json.loads(SNAPSHOT.read_text())
    if (made_with := before.pop("wandb-workspaces")) != installed:
        pytest.skip(f"made with wandb-workspaces {made_with}, and {installed} is installed")
    assert plan == before


def test_the_same_is_made_at_every_call(plan):
    assert json.dumps(planned(*NAMES)) == json.dumps(plan)


@pytest.mark.parametrize(
    "group",
    [
        "clinics",
        'it\'s "quoted"',
        "alpha=0.1 <x> != >=",
        "a\\nb\\",
        "two\nlines\ttab",
        "Metric('State') within_last 5 days",
        "100% / #1? {x}",
        "x') or Metric('State') == 'finished' or ('1' == '1",
        "病院 😀",
    ],
)
def test_exactly_one_group_is_selected(group):
    plan = planned("team", "project", group)
    (*found,) = _run_sets(plan)
    assert len(found) == 7
    for runs in found:
        (only,) = runs["filters"]["filters"]
        assert only["key"] == {"section": "run", "name": "group"}
        assert (only["op"], only["value"], only["disabled"]) == ("=", group, False)
    assert plan["report"]["displayName"] == plan["workspace"]["displayName"]
    json.dumps(plan).encode()


def test_the_workspace_groups_by_job_type_and_shows_many_runs(plan):
    section = plan["workspace"]["spec"]["section"]
    assert section["runSets"][0]["grouping"] == [{"section": "run", "name": "jobType"}]
    assert section["settings"]["maxRuns"] == 100
    assert section["settings"]["xAxis"] == "trainer/global_step"
    assert section["settings"]["shouldAutoGeneratePanels"] is False


def test_the_report_is_about_its_project(plan):
    project = {"name": "x-rays", "entityName": "a team"}
    assert plan["report"]["project"] == project
    assert [runs["project"] for grid in _grids(plan) for runs in grid["runSets"]] == [project] * 6


def test_both_answer_the_same_questions_with_the_same_panels(plan):
    sections = plan["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]
    questions = [section["name"] for section in sections]
    assert questions == [
        "Who holds what",
        "How the clients trained",
        "What the curvature says",
        "How the merge went",
        "What was gained",
        "What it cost",
    ]
    blocks = plan["report"]["spec"]["blocks"]
    assert [b["children"][0]["text"] for b in blocks if b["type"] == "heading"] == questions
    panels = list(_panels(plan))
    for section, grid in zip(panels[:6], panels[6:], strict=True):
        text, *others = section
        assert text["viewType"] == "Markdown Panel"
        assert [panel["config"] for panel in others] == [panel["config"] for panel in grid]


def test_no_panel_covers_another_or_leaves_the_grid(plan):
    for panels in _panels(plan):
        layouts = [panel["layout"] for panel in panels]
        for a in layouts:
            assert 0 <= a["x"] < a["x"] + a["w"] <= 24
            assert a["y"] >= 0 < a["h"]
        for a, b in combinations(layouts, 2):
            apart = any(
                first[at] + first[size] <= second[at]
                for at, size in (("x", "w"), ("y", "h"))
                for first, second in ((a, b), (b, a))
            )
            assert apart, (a, b)


def test_every_section_fits_on_one_page(plan):
    for section in plan["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]:
        flow = section["flowConfig"]
        assert section["isOpen"]
        assert flow["columnsPerPage"] * flow["rowsPerPage"] >= len(section["panels"])


def test_every_chart_has_a_title_of_its_own(plan):
    panels = [panel for panels in list(_panels(plan))[6:] for panel in panels]
    charts = [panel["config"] for panel in panels if panel["viewType"] != "Weave"]
    titles = [c.get("chartTitle") or c["stringSettings"]["title"] for c in charts]
    assert len(set(titles)) == len(titles)
    assert max(map(len, titles)) <= 64


def test_lines_are_of_single_runs_by_a_pattern(plan):
    for config in _of_type(plan, "Run History Line Plot"):
        assert config["useMetricRegex"] is True
        assert config["metrics"] == []
        assert config["aggregate"] is False
        assert config["limit"] == 100
        axes = {"loss": "epoch", "^residual$": "iterations", "^objective$": "iterations"}
        axis = [x for part, x in axes.items() if part in config["metricRegex"]]
        assert [config["xAxis"]] == (axis or ["trainer/global_step"])
        assert isinstance(config["yLogScale"], bool)


class Keys(DummyLogger):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def log_metrics(self, metrics, step=None):
        self.seen |= set(metrics)


def test_whatever_is_logged_is_shown(plan, tmp_path):
    client, server = Keys(), Keys()
    callback = FedFisherCallback(tmp_path / "update.safetensors")
    quiet_trainer(tmp_path, callbacks=[callback], logger=client).fit(tiny_model(), tiny_loader())
    merge = FisherMergeModule([callback.path] * 2, allow_duplicates=True)
    quiet_trainer(tmp_path, max_epochs=-1, logger=server).fit(merge)
    bars = {key for config in _of_type(plan, "Bar Chart") for key in config["metrics"]}
    for logger, at_least in ((client, 11), (server, 11)):
        keys = {k for k in logger.seen if not re.match("epoch$|iterations/", k)}
        assert len(keys) >= at_least
        for key in keys - bars:
            assert any(re.search(pattern, key) for pattern in _patterns(plan)), key


def test_charts_are_drawn_as_they_were_logged(plan):
    logged = {}
    logger = SimpleNamespace(log_table=lambda *_, **__: None)
    logger.log_metrics = lambda metrics, **_: logged.update(metrics)
    record = federation()
    log_federation(logger, record)
    _log_curvature(logger, "fedfisher", record.clients[0].curvature, step=0)
    rows = wandb.Table(["class", "samples"], [["class 0", 1]])
    logged["data/classes"] = wandb.plot.bar(rows, "class", "samples")
    shown = {}
    for config in _of_type(plan, "Vega2"):
        (query,) = config["userQuery"]["queryFields"]
        shown[query["fields"][-1]["args"][0]["value"]] = config, query["fields"]
    assert len(shown) == len(logged) == 5
    for key, chart in logged.items():
        chart.set_key(key)
        own = chart.spec.config_value["panel_config"]
        config, asked = shown[chart.spec.table_key]
        for part in ("panelDefId", "fieldSettings", "transform"):
            assert config[part] == own[part]
        names = [field["name"] for field in own["userQuery"]["queryFields"][0]["fields"]]
        assert sorted(field["name"] for field in asked) == sorted(names)
        assert set(config["stringSettings"]) == set(own["stringSettings"])
        assert set(own["fieldSettings"].values()) <= set(chart.table.columns)


def test_tables_are_those_that_are_logged(plan):
    text = json.dumps(plan)
    for table in ("partition", "fedfisher/curvature", "clients", "comparison"):
        assert text.count(f'"val": "{table}"') == 2


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("", "p", "g"), "'' is no entity"),
        (("e", "e/p", "g"), "'e/p' is no project"),
        (("e?", "p", "g"), "'e?' is no entity"),
        (("e", " ", "g"), "' ' is no project"),
        (("e", "p", ""), "group"),
    ],
)
@pytest.mark.parametrize("make", [workspace, report])
def test_names_that_nothing_can_have_are_refused(make, names, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        make(*names)


def test_titles_fit_into_an_address():
    for made in (workspace("e", "p", "a/b?#% 😀=\n" * 40), report("e", "p", "a/b?#% 😀=\n" * 40)):
        title = made.name if hasattr(made, "name") else made.title
        assert len(title) == 128
        assert re.fullmatch(r"Federation [a-b -]+", title)


def test_nothing_else_needs_the_extra():
    sources = Path(lightning_fedfisher.__file__).parent.rglob("*.py")
    found = {path.name for path in sources if "wandb_workspaces" in path.read_text()}
    assert found == {"wandb_workspace.py", "wandb_panels.py"}
    imports = re.compile("^(from|import) .*wandb_(workspace|panels)", re.MULTILINE)
    sources = list(Path(cli.__file__).parent.glob("*.py"))
    assert len(sources) > 5
    assert not [path.name for path in sources if imports.search(path.read_text())]
