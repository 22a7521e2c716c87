"""The walls between rooms: who may import whom, what is public, and what every module must have.

Each rule is a function of `helpers.architecture`; below the rules, each is shown to fail.
"""

import importlib
import importlib.util
from pathlib import Path

import pytest
from helpers.architecture import (
    ANYTHING,
    TOP,
    Package,
    breaches,
    broken_statements,
    cycles,
    exported,
    imports_among_tests,
    imports_of,
    longest_way,
    misshapen,
    misstated,
    reached,
    statement,
    stray_refusals,
    untested,
    without_doctest,
)

import lightning_fedfisher
from lightning_fedfisher import errors

TESTS = Path(__file__).parent
PACKAGE = Package.read(Path(lightning_fedfisher.__file__).parent)

# What each room may import of ours.
MAY_IMPORT = {
    "_utils": [],
    "errors": [],
    "curvature": [],
    "likelihoods": [],
    "distributed": [],
    "layers": ["errors"],
    "batch_norms": ["layers"],
    "losses": [],
    "layer_features": ["_utils"],
    "random_features": [],
    "update": ["curvature", "likelihoods", "batch_norms", "layers", "errors", "_utils"],
    "extraction": [
        *("curvature", "likelihoods", "batch_norms", "layers", "distributed", "errors", "_utils"),
        "update.header",
    ],
    "merge": [
        *("update", "curvature", "likelihoods", "batch_norms", "layers", "distributed"),
        *("errors", "_utils"),
    ],
    "secure_aggregation": ["merge", "update", "curvature", "layers", "errors"],
    "results": ["merge", "update", "curvature", "_utils", "errors"],
    "tracking": ["results", "update", "merge", "curvature", "distributed", "_utils"],
    "report": ["results", "merge", "curvature", "_utils"],
    "closed_form_head": ["extraction", "update"],
    "callback": ANYTHING,
    "client_run": ANYTHING,
    "merge_module": ANYTHING,
    "plan": ANYTHING,
    "cli": ANYTHING,
    TOP: ANYTHING,
}
# What a room may not import although it may import the room or anything.
NEVER = {
    "extraction": ["distributed.lightning_strategies"],
    "merge": ["distributed.lightning_strategies"],
    "callback": ["report", "cli", TOP],
    "client_run": ["callback", "merge", "merge_module", "tracking", "report", "cli", TOP],
    "merge_module": ["report", "cli", TOP],
    "plan": ["callback", "merge_module", "tracking", "report", "cli", TOP],
    TOP: ["cli"],
}
MOST_LEVELS = 9
MOST_LINES = 400

LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")  # not lightning_utilities
WITHOUT_LIGHTNING = ("extraction", "merge", "update", "curvature", "likelihoods")
CHEAP = ("update", "curvature", "likelihoods")  # read by servers that show a file's header
SLOW = (*LIGHTNING, "torchvision", "torchmetrics", "pydantic", "wandb", "backpack", "plotly")

PUBLIC = [
    "BudgetError",
    "ClientUpdate",
    "FedFisherCallback",
    "FedFisherError",
    "FisherMergeModule",
    "LayerFeatures",
    "METHODS",
    "MergeError",
    "MergeMethod",
    "PriorCrossEntropy",
    "RandomFeatures",
    "UnsupportedModelError",
    "UpdateError",
    "__version__",
    "extract_curvature",
    "federation_logger",
    "fit_closed_form_head",
    "merge_updates",
    "plan_update",
    "write_report",
]
# Rooms that only other rooms use, so that nothing of theirs is public.
PRIVATE = ("_utils", "cli")
EXTRAS = {  # optional packages, and the rooms and modules that need them
    "plotly": ["report"],
    "jinja2": ["report"],
    "wandb_workspaces": ["tracking.wandb_workspace", "tracking.wandb_panels"],
}
# Modules without a test file of their own, and the one that tests them with what they serve.
TESTED_ELSEWHERE = {
    "curvature.base": "curvature/test_kinds.py",  # each of the kinds is one file, all have one test
    "curvature.dense": "curvature/test_kinds.py",
    "curvature.diagonal": "curvature/test_kinds.py",
    "curvature.embedding": "curvature/test_kinds.py",
    "curvature.kronecker": "curvature/test_kinds.py",
    "curvature.registry": "curvature/test_kinds.py",
    "curvature.input_map": "curvature/test_kinds.py",
    "merge.without_trainer": "merge/test_merger.py",
}


def _needs_what_is_missing(module):
    return any(
        module == room or module.startswith(f"{room}.")
        for extra, rooms in EXTRAS.items()
        if importlib.util.find_spec(extra) is None
        for room in rooms
    )


def _modules():
    """Every module of the package that can be imported here, by its name below the package."""
    return {
        name: importlib.import_module(
            "lightning_fedfisher" if name == TOP else f"lightning_fedfisher.{name}"
        )
        for name in PACKAGE.sources
        if not _needs_what_is_missing(name)
    }


# The rules


def _none(problems):
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def test_rooms_import_what_the_contract_allows():
    _none(breaches(PACKAGE, MAY_IMPORT, NEVER))


def test_rooms_say_what_they_may_import():
    _none(misstated(PACKAGE, MAY_IMPORT))


def test_folders_in_rooms_import_what_they_say():
    _none(broken_statements(PACKAGE))


@pytest.mark.parametrize("room", WITHOUT_LIGHTNING)
def test_the_core_knows_nothing_of_lightning(room):
    _none(imports_of(PACKAGE, room, LIGHTNING))
    _none(reached(PACKAGE, room, LIGHTNING))


@pytest.mark.parametrize("room", CHEAP)
def test_cheap_rooms_import_nothing_slow(room):
    _none(reached(PACKAGE, room, SLOW))


def test_no_import_goes_in_a_circle():
    _none(cycles(PACKAGE))
    _none(cycles(PACKAGE, rooms=True))


def test_the_house_is_low():
    _none(cycles(PACKAGE, rooms=True))
    way = longest_way(PACKAGE)
    assert len(way) <= MOST_LEVELS, " -> ".join(way)


def test_modules_are_short_and_have_names():
    _none(misshapen(PACKAGE, MOST_LINES))


def test_public_names_are_those_agreed():
    assert sorted({*lightning_fedfisher.__all__, "__version__"}) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_can_be_imported(name):
    if name == "write_report" and _needs_what_is_missing("report"):
        pytest.skip("an extra is missing")
    assert getattr(lightning_fedfisher, name)


def test_every_module_can_be_imported():
    assert len(_modules()) > len(PACKAGE.sources) / 2  # the others need extras


def test_rooms_name_what_is_public():
    modules = _modules()
    rooms = [room for room in PACKAGE.folders if "." not in room and room not in PRIVATE]
    _none([room for room in rooms if room in modules and not exported(modules[room])])


def test_public_names_have_an_example_that_runs():
    modules = _modules()
    names = {}
    for room in PACKAGE.rooms():
        if room in modules and room not in PRIVATE:
            names |= exported(modules[room])
    _none(without_doctest(names))


def test_every_module_has_a_test_of_its_name():
    tests = {path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
    _none(untested(PACKAGE, tests, TESTED_ELSEWHERE))


def test_refusals_are_of_one_family():
    kinds = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.FedFisherError)
    }
    _none(stray_refusals(PACKAGE, "FedFisherError", kinds))


def test_no_test_file_imports_another():
    sources = {str(path.relative_to(TESTS)): path.read_text() for path in TESTS.rglob("*.py")}
    _none(imports_among_tests(sources))


# The rules can fail


def _package(**sources):
    """A package by its modules' sources; names with `__` are below a folder."""
    named = {
        name.replace("__", ".") if name != TOP else TOP: text for name, text in sources.items()
    }
    folders = {name.rpartition(".")[0] for name in named if "." in name}
    return Package("house", dict.fromkeys(folders, "") | named, sorted(folders))


@pytest.mark.parametrize(
    "line",
    [
        "import house.attic",
        "import house.attic.chest as chest",
        "from house import attic",
        "from house.attic import chest",
        "from house.attic.chest import Gold",
        "from .. import attic",
        "from ..attic.chest import Gold",
        "def late():\n    from house.attic import chest",
        "class Box:\n    def late(self):\n        import house.attic",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.attic import chest",
        "try:\n    import house.attic\nexcept ImportError:\n    pass",
        "import importlib\ndef late():\n    importlib.import_module('house.attic.chest')",
    ],
)
def test_every_form_of_an_import_is_seen(line):
    house = _package(cellar__wine=line, attic__chest="Gold = 1")
    contract = {"cellar": [], "attic": []}
    assert len(breaches(house, contract, {})) == 1
    for allowed in (["attic"], ANYTHING):
        assert breaches(house, {"cellar": allowed, "attic": []}, {}) == []
        never = {"cellar": ["attic"]}
        assert len(breaches(house, {"cellar": allowed, "attic": []}, never)) == 1


def test_imports_are_told_apart():
    text = (
        "import a\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import b\nelse:\n    import c\n"
        "def late():\n    import d\n"
    )
    when = {each.target: each.when for each in _package(hall=text).imports()}
    assert when == {
        "a": "always",
        "typing": "always",
        "b": "for types",
        "c": "always",
        "d": "in a function",
    }


def test_one_module_of_a_room_may_be_allowed():
    contract = {"cellar": ["attic.chest"], "attic": []}
    for line, count in (
        ("from house.attic.chest import Gold", 0),
        ("from house.attic import chest", 0),
        ("from house.attic import Gold", 1),
        ("from house.attic.chest_of_others import Gold", 1),
    ):
        house = _package(cellar__wine=line, attic__chest="", attic__chest_of_others="")
        assert len(breaches(house, contract, {})) == count


def test_rooms_and_contracts_need_one_another():
    assert len(breaches(_package(hall=""), {"cellar": []}, {})) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("A room.\n\nMay import: nothing of this package.\n", []),
        ("A room. May import: anything.", ANYTHING),
        ("A room. May import: everything.", ANYTHING),
        ("A room.\n\nMay import: a, b_c,\n_d and `e.f`. Needs x.", ["a", "b_c", "_d", "e.f"]),
        ("A room.", None),
    ],
)
def test_what_a_docstring_allows_is_read(text, says):
    assert statement(text) == says
    house = _package(hall=f'"""{text}"""', hall__door="")
    contract = {"hall": says if says is not None else []}
    assert bool(misstated(house, contract)) == (says is None)
    assert misstated(house, {"hall": ["another"]})


def test_folders_in_rooms_are_held_to_their_word():
    inner = {"hall__shelf__book": "from house.hall import lamp\nfrom house.cellar import wine"}
    others = {"hall__lamp": "", "cellar__wine": ""}
    for word, count in (
        ("lamp, cellar", 0),
        ("lamp", 1),
        ("cellar.wine", 1),
        ("nothing of this package", 2),
        ("anything", 0),
    ):
        house = _package(**others, **inner, hall__shelf=f'"""Books. May import: {word}."""')
        assert len(broken_statements(house)) == count
    assert len(broken_statements(_package(**others, **inner))) == 1


def test_what_is_reached_by_others_is_found():
    house = _package(
        __init__="", hall__door="from house import stairs", stairs="import house.attic.chest",
        attic="import slow.thing", attic__chest="def late():\n    import slower",
    )  # fmt: skip
    (way,) = reached(house, "hall", ["slow", "slower"])
    assert way == "hall.door -> stairs -> attic -> slow.thing"
    assert reached(house, "hall", ["slower"]) == []
    assert reached(_package(__init__="import slow", hall=""), "hall", ["slow"])
    assert imports_of(house, "attic", ["slower"])
    assert not imports_of(house, "hall", ["slower"])


@pytest.mark.parametrize("last", ["import house.a", "def late():\n    import house.a"])
def test_circles_are_found(last):
    assert cycles(_package(a="import house.b", b="import house.c", c=last)) == ["a, b, c"]
    assert cycles(_package(a="import house.b", b="import house.c", c="")) == []
    rooms = _package(a__one="import house.b", a__two="", b="import house.a.two")
    assert cycles(rooms) == []
    assert cycles(rooms, rooms=True) == ["a, b"]


def test_the_longest_way_down_is_found():
    house = _package(a="import house.b, house.c", b="import house.c", c__x="import house.d", d="")
    assert longest_way(house) == ["a", "b", "c", "d"]


def test_long_and_nameless_modules_are_found():
    assert len(misshapen(_package(hall="\n" * 401), 400)) == 1
    assert misshapen(_package(hall="\n" * 400), 400) == []
    for name in ("hall__utils", "common", "hall__misc", "helpers", "hall___helpers"):
        assert misshapen(_package(**{name: ""}), 400)
    assert misshapen(_package(_utils__text=""), 400) == []


def test_names_without_an_example_are_found():
    class Plain:
        """Nothing to run."""

    class Shown:
        """>>> 1 + 1
        2
        """

    assert without_doctest({"a": Plain, "b": Shown, "c": 3, "d": {}, "e": len}) == ["a", "e"]


def test_untested_modules_are_found():
    house = _package(__init__="", hall__door="", hall___lock="", stairs="")
    tests = {"hall/test_door.py", "test_stairs.py", "hall/test_lock.py"}
    assert untested(house, tests, {}) == []
    assert len(untested(house, tests - {"hall/test_door.py"}, {})) == 1
    assert untested(house, tests - {"hall/test_door.py"}, {"hall.door": "test_stairs.py"}) == []
    assert len(untested(house, tests, {"hall.door": "test_stairs.py"})) == 1
    assert len(untested(house, tests, {"window": "test_stairs.py"})) == 1
    assert len(untested(house, tests - {"test_stairs.py"}, {"stairs": "test_roof.py"})) == 1


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("class A(ValueError):\n    def __init__(self, offenders): self.offenders = offenders", 1),
        ("class A(ValueError):\n    pass", 0),
        ("class A(Known):\n    def __init__(self, offenders): self.offenders = offenders", 0),
        ("def f(offenders):\n    raise ValueError('; '.join(offenders))", 1),
        ("def f(offenders):\n    raise Known(offenders)", 0),
        ("def f(offenders):\n    raise ValueError('one')", 0),
    ],
)
def test_stray_refusals_are_found(text, count):
    assert len(stray_refusals(_package(hall=text), "Base", {"Base", "Known"})) == count


def test_imports_among_tests_are_found():
    bad = {
        "a": "from test_b import thing",
        "b": "import test_c",
        "c": "from tests.merge.test_d import thing",
        "d": "from . import test_e",
        "e": "def late():\n    from test_f import thing",
    }
    assert len(imports_among_tests(bad)) == len(bad)
    assert imports_among_tests({"a": "from helpers.ddp import run_ddp\nimport pytest"}) == []
