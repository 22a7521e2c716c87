"""W&B dashboards as code: a workspace and a report of one federation's runs.

They show what clients and servers log, by the names in `logged_keys`. Nothing here reads a run, so
both can be made before the first client has trained.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

try:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr
except ImportError as error:
    raise ImportError(
        "a dashboard needs wandb-workspaces: pip install 'lightning-fedfisher[dashboard]'"
    ) from error

from lightning_fedfisher._utils.text import wandb_title
from lightning_fedfisher.tracking import logged_keys as keys
from lightning_fedfisher.tracking.wandb_panels import MOST_RUNS, sections

_NOT_IN_NAMES = frozenset("/\\#?%:")  # of W&B's entities and projects
_IDS = frozenset(("id", "__id__"))


def workspace(entity: str, project: str, group: str) -> ws.Workspace:
    """Makes the W&B workspace of a federation: its runs alone, grouped by their job type.

    Args:
        entity: The W&B user or team.
        project: The W&B project of the runs.
        group: The federation's name, which is the W&B group of its runs.

    Returns:
        A workspace that is not saved yet.

    Raises:
        ValueError: If W&B allows no entity, project or group of that name.
    """
    _check(entity, project, group)
    shown = []
    for section in sections():
        panels = section.panels((3, [wr.MarkdownPanel(markdown=section.text)]))
        page = ws.SectionLayoutSettings(columns=2, rows=-(-len(panels) // 2))
        shown.append(
            ws.Section(name=section.title, panels=panels, is_open=True, layout_settings=page)
        )
    return ws.Workspace(
        entity=entity,
        project=project,
        name=wandb_title(f"Federation {group}"),
        sections=shown,
        settings=ws.WorkspaceSettings(x_axis=keys.GLOBAL_STEP, max_runs=MOST_RUNS),
        runset_settings=ws.RunsetSettings(
            filters=_filter(group),
            groupby=[expr.Metric("JobType")],
            order=[expr.Ordering(expr.Metric("Name"), ascending=True)],
        ),
    )


def report(entity: str, project: str, group: str) -> wr.Report:
    """Makes the W&B report of a federation: the same panels, told from the data to the costs.

    Args:
        entity: The W&B user or team.
        project: The W&B project of the runs.
        group: The federation's name, which is the W&B group of its runs.

    Returns:
        A report that is not saved yet.

    Raises:
        ValueError: If W&B allows no entity, project or group of that name.
    """
    _check(entity, project, group)
    blocks: list[Any] = [
        wr.P(
            text=[
                "The clients of ",
                wr.InlineCode(text=group),
                " trained alone, once, and sent their weights with the curvature of their loss. "
                "The server made one model of them, in one round and without their data.",
            ]
        ),
    ]
    for section in sections():
        runs = wr.Runset(
            entity=entity,
            project=project,
            name=wandb_title(f"Federation {group}"),
            filters=_filter(group),
            order=[wr.OrderBy(name="Name", ascending=True)],
        )
        grid = wr.PanelGrid(runsets=[runs], panels=section.panels(), hide_run_sets=len(blocks) > 1)
        blocks += [wr.H2(text=section.title), wr.P(text=section.text), grid]
    return wr.Report(
        entity=entity,
        project=project,
        title=wandb_title(f"Federation {group}"),
        description="Made by fedfisher dashboard.",
        blocks=blocks,
        width="fluid",
    )


def planned(entity: str, project: str, group: str) -> dict[str, Any]:
    """Makes what `save` would send for a federation, without a network.

    Args:
        entity: The W&B user or team.
        project: The W&B project of the runs.
        group: The federation's name, which is the W&B group of its runs.

    Returns:
        The ``workspace`` and the ``report`` in W&B's own form, ready to be written as JSON. It is
        the same at every call: ids that W&B draws at random are left out.
    """
    made = report(entity, project, group)
    for block in made.blocks:
        for runs in getattr(block, "runsets", ()):
            runs.entity = ""  # or W&B is asked for the project's number
    models = {"workspace": workspace(entity, project, group), "report": made}
    plain = {
        name: _without_ids(
            model._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
        )
        for name, model in models.items()
    }
    for block in plain["report"]["spec"]["blocks"]:
        for runs in block.get("metadata", {}).get("runSets", ()):
            runs["project"] = {"entityName": entity, "name": project}
    return plain


def save(made: ws.Workspace | wr.Report) -> str:
    """Saves a workspace or a report on W&B.

    Args:
        made: What `workspace` or `report` made.

    Returns:
        The address at which it can be seen.

    Raises:
        ValueError: If W&B cannot be reached, does not know the project or refuses.
    """
    import wandb

    try:
        wandb.Api()  # has the clearest message if nobody is logged in
        made.save()
        # Entities and projects may hold spaces, and the library leaves them as they are.
        return quote(made.url, safe=":/?=")
    except wandb.errors.UsageError as error:
        raise ValueError(f"not logged in to W&B: {_line(error)}") from error
    except Exception as error:  # the library raises any kind
        what = type(made).__name__.lower()
        raise ValueError(f"W&B did not take the {what}: {_line(error)}") from error


def _check(entity: str, project: str, group: str) -> None:
    """Refuses names that W&B does not allow."""
    for what, name in (("entity", entity), ("project", project)):
        if not name.strip() or _NOT_IN_NAMES.intersection(name):
            raise ValueError(
                f"{name!r} is no {what} of W&B: it must be a name without any of /\\#?%:"
            )
    if not group:
        raise ValueError("the group must have a name")


def _filter(group: str) -> str:
    """Writes the filter that selects the runs of a group, whatever the group is called."""
    # The library rewrites operators before it parses them, even inside strings.
    safe = "".join(c if c.isascii() and (c.isalnum() or c in " _.-") else _escape(c) for c in group)
    return f"Metric('Group') == '{safe}'"


def _escape(character: str) -> str:
    """Writes a character as Python's escape for a string literal."""
    return f"\\U{ord(character):08x}"


def _line(error: Exception) -> str:
    """Puts an exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _without_ids(value: Any) -> Any:
    """Copies JSON without the ids that W&B draws at random."""
    if isinstance(value, dict):
        return {key: _without_ids(item) for key, item in value.items() if key not in _IDS}
    if isinstance(value, list):
        return [_without_ids(item) for item in value]
    return value
