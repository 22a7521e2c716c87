"""Checks of a package's shape, from its source alone: each returns a line for each problem."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

ANYTHING = "anything"
TOP = "__init__"  # the package itself, as a room
BANNED_NAMES = ("utils", "helpers", "misc", "common")


@dataclass(frozen=True)
class Import:
    """One module imported by another.

    Attributes:
        source: the module that imports, below the package: `merge.solvers`, or `__init__`.
        target: what it imports: written like `source` if `ours`, else its full name.
        when: "always", or later: "in a function" or "by name"; or never: "for types".
        line: where in the file.
        ours: whether it is a module of the package.
    """

    source: str
    target: str
    when: str
    line: int
    ours: bool

    def __str__(self) -> str:
        when = "" if self.when == "always" else f", {self.when}"
        return f"{self.source} imports {self.target} (line {self.line}{when})"


@dataclass(frozen=True)
class Package:
    """The source of a package's modules, by their names below it: `merge`, `merge.solvers`.

    Attributes:
        name: of the package itself.
        sources: the text of each module.
        folders: modules that are folders, with an `__init__`.
    """

    name: str
    sources: Mapping[str, str]
    folders: Collection[str] = ()

    @classmethod
    def read(cls, folder: Path) -> Package:
        """Every module below a folder."""
        sources, folders = {}, []
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if parts[-1] == TOP and len(parts) > 1:
                parts = parts[:-1]
                folders.append(".".join(parts))
            sources[".".join(parts)] = path.read_text(encoding="utf-8")
        return cls(folder.name, sources, folders)

    def rooms(self) -> list[str]:
        """The folders and modules directly below the package."""
        return [name for name in self.sources if "." not in name]

    def docstring(self, module: str) -> str:
        """What a module says of itself."""
        return ast.get_docstring(ast.parse(self.sources[module])) or ""

    def imports(self) -> list[Import]:
        """Every import of every module, whenever it is done."""
        return [found for module in self.sources for found in self._imports_of(module)]

    def _imports_of(self, module: str) -> Iterator[Import]:
        tree = ast.parse(self.sources[module])
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                name = getattr(node.args[0], "value", "") if node.args else ""
                if (target := self._below(str(name))) is not None:
                    yield Import(module, target, "by name", node.lineno, True)
        for node, when in _statements(tree, "always"):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                base = self._base(module, node)
                names = list(dict.fromkeys(self._deepest(base, name) for name in names))
            for name in names:
                target = self._below(name)
                yield Import(module, target or name, when, node.lineno, target is not None)

    def _base(self, module: str, node: ast.ImportFrom) -> str:
        """The full name of what a `from` names, relative or not."""
        if not node.level:
            return node.module or ""
        parts = [self.name, *([] if module == TOP else module.split("."))]
        steps = node.level - (module in self.folders or module == TOP)
        parts = parts[: len(parts) - steps]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _deepest(self, base: str, name: str) -> str:
        """`base.name` where that is a module of ours, else `base`."""
        below = self._below(f"{base}.{name}")
        return f"{base}.{name}" if below in self.sources else base

    def _below(self, name: str) -> str | None:
        if name == self.name:
            return TOP
        return name.removeprefix(f"{self.name}.") if name.startswith(f"{self.name}.") else None


def _statements(node: ast.AST, when: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, when
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _statements(child, "in a function" if when == "always" else when)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for inner in child.body:
                yield from _statements(ast.Module([inner], []), "for types")
            for inner in child.orelse:
                yield from _statements(ast.Module([inner], []), when)
        else:
            yield from _statements(child, when)


def room_of(module: str) -> str:
    """The room that a module is in: `merge` for `merge.solvers`."""
    return module.split(".")[0]


def _is_below(module: str, entry: str) -> bool:
    return module == entry or module.startswith(f"{entry}.")


def breaches(
    package: Package,
    contract: Mapping[str, Sequence[str] | str],
    never: Mapping[str, Sequence[str]],
) -> list[str]:
    """Imports from room to room that a contract does not allow, and rooms without one.

    Args:
        package: the package.
        contract: what each room may import: rooms, or modules in them; or `ANYTHING`.
        never: what a room may not import although the contract allows it.
    """
    found = [f"{room} has no contract" for room in package.rooms() if room not in contract]
    found += [
        f"the contract's {room} does not exist" for room in contract if room not in package.rooms()
    ]
    for each in package.imports():
        room = room_of(each.source)
        if not each.ours or room_of(each.target) == room or room not in contract:
            continue
        allowed = contract[room] == ANYTHING or any(
            _is_below(each.target, entry) for entry in contract[room]
        )
        if not allowed or any(_is_below(each.target, entry) for entry in never.get(room, ())):
            found.append(str(each))
    return found


def statement(docstring: str) -> list[str] | str | None:
    """What a docstring says after "May import:"; none if it does not say."""
    match = re.search(r"May\s+import:(.*?)\.(?=\s|$)", docstring, re.DOTALL)
    if match is None:
        return None
    entries = [word.strip(" `\n") for word in re.split(r",|\band\b", match[1])]
    if entries in ([ANYTHING], ["everything"]):
        return ANYTHING
    return [] if entries == ["nothing of this package"] else [word for word in entries if word]


def misstated(package: Package, contract: Mapping[str, Sequence[str] | str]) -> list[str]:
    """Rooms whose docstring does not say of them what the contract says."""
    found = []
    for room in package.rooms():
        says = statement(package.docstring(room))
        agreed = contract.get(room, ANYTHING)
        if says is None:
            if room in package.folders and room != TOP:
                found.append(f"{room} does not say what it may import")
        elif (says if says == ANYTHING else {*says}) != (
            agreed if agreed == ANYTHING else {*agreed}
        ):
            found.append(f"{room} says {says}, and the contract {agreed}")
    return found


def broken_statements(package: Package) -> list[str]:
    """Imports of a folder in a room that the folder's own docstring does not allow."""
    found = []
    for folder in package.folders:
        parent = folder.rpartition(".")[0]
        if not parent:
            continue
        says = statement(package.docstring(folder))
        if says is None:
            found.append(f"{folder} does not say what it may import")
            continue
        if says == ANYTHING:
            continue
        near = [
            f"{parent}.{word}" if f"{parent}.{word}" in package.sources else word for word in says
        ]
        found += [
            str(each)
            for each in package.imports()
            if each.ours and _is_below(each.source, folder) and not _is_below(each.target, folder)
            if not any(_is_below(each.target, entry) for entry in near)
        ]
    return found


def reached(package: Package, room: str, others: Collection[str]) -> list[str]:
    """Packages of others that importing a room's modules imports, and the way to each.

    What is imported in functions or for types does not count; the `__init__` above a module does.
    """
    direct: dict[str, list[str]] = {module: [] for module in package.sources}
    foreign = []
    for each in package.imports():
        if each.when == "always" and each.source in direct:
            if each.ours:
                direct[each.source].append(each.target)
            elif each.target.split(".")[0] in others:
                foreign.append(each)
    for module, targets in direct.items():
        for name in [module, *targets]:
            parts = name.split(".")
            targets += [".".join(parts[:end]) for end in range(1, len(parts))]
        if module != TOP:
            targets.append(TOP)
    start = [module for module in package.sources if room_of(module) == room]
    ways = {module: module for module in start}
    for module in start:
        for target in direct[module]:
            if target in direct and target not in ways:
                ways[target] = f"{ways[module]} -> {target}"
                start.append(target)
    return [f"{ways[each.source]} -> {each.target}" for each in foreign if each.source in ways]


def imports_of(package: Package, room: str, others: Collection[str]) -> list[str]:
    """Imports of others' packages in a room, wherever they stand."""
    return [
        str(each)
        for each in package.imports()
        if room_of(each.source) == room and not each.ours and each.target.split(".")[0] in others
    ]


def _graph(package: Package, rooms: bool) -> dict[str, set[str]]:
    def name(module: str) -> str:
        return room_of(module) if rooms else module

    graph: dict[str, set[str]] = {name(module): set() for module in package.sources}
    for each in package.imports():
        if each.ours and name(each.source) != name(each.target):
            graph[name(each.source)].add(name(each.target))
            graph.setdefault(name(each.target), set())
    return graph


def cycles(package: Package, rooms: bool = False) -> list[str]:
    """Groups of modules (or of rooms) that all import one another, by whatever way."""
    graph = _graph(package, rooms)

    def below(start: str) -> set[str]:
        found, waiting = set(), [start]
        while waiting:
            fresh = graph[waiting.pop()] - found
            found |= fresh
            waiting += fresh
        return found

    reach = {name: below(name) for name in graph}
    groups = {
        tuple(sorted(other for other in reach[name] if name in reach[other]))
        for name in graph
        if name in reach[name]
    }
    return [", ".join(group) for group in sorted(groups)]


def longest_way(package: Package) -> list[str]:
    """The longest way down from room to room, in a package without cycles between rooms."""
    graph = _graph(package, rooms=True)

    @cache
    def down(room: str) -> tuple[str, ...]:
        ways = [down(below) for below in sorted(graph[room])]
        return (room, *max(ways, key=len, default=()))

    return list(max((down(room) for room in sorted(graph)), key=len))


def misshapen(package: Package, most_lines: int) -> list[str]:
    """Modules that are too long, or whose names say nothing."""
    found = []
    for module, source in package.sources.items():
        if (lines := len(source.splitlines())) > most_lines:
            found.append(f"{module} has {lines} lines")
        if {part.strip("_") for part in module.split(".")[1:] or [module]} & {*BANNED_NAMES} and (
            module != "_utils"
        ):
            found.append(f"{module} could be anything")
    return found


def without_doctest(names: Mapping[str, object]) -> list[str]:
    """Classes and functions whose docstring has no example that can be run."""
    return [
        name
        for name, value in names.items()
        if callable(value) and hasattr(value, "__qualname__")
        if ">>> " not in (value.__doc__ or "")
    ]


def exported(module: ModuleType) -> dict[str, object]:
    """What a module's `__all__` names."""
    return {
        f"{module.__name__}.{name}": getattr(module, name)
        for name in getattr(module, "__all__", ())
    }


def untested(package: Package, tests: Collection[str], elsewhere: Mapping[str, str]) -> list[str]:
    """Modules without a test file of their name in the folder of their name.

    Args:
        package: the package.
        tests: paths of the test files below their folder: `merge/test_solvers.py`.
        elsewhere: where a module is tested, for those that need no file of their own.
    """
    found = []
    for module in package.sources:
        *folders, name = module.split(".")
        has_own = "/".join([*folders, f"test_{name.strip('_')}.py"]) in tests
        if module == TOP or module in package.folders:
            continue
        if not has_own and module not in elsewhere:
            found.append(f"{module} has no test file of its name")
        if has_own and module in elsewhere:
            found.append(f"{module} has a test file of its name: no exception is needed")
    found += [
        f"{name}, an exception, does not exist" for name in elsewhere if name not in package.sources
    ]
    found += [
        f"{path}, for {name}, does not exist"
        for name, path in elsewhere.items()
        if path not in tests
    ]
    return found


def stray_refusals(package: Package, base: str, kinds: Collection[str]) -> list[str]:
    """Errors that list offenders and are of none of the kinds that a caller can catch at once.

    Args:
        package: the package.
        base: the name of the one class that all of them derive from.
        kinds: names of that class and of those derived from it.
    """
    found = []
    for module, source in package.sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and node.name not in kinds:
                bases = {ast.unparse(each).split(".")[-1] for each in node.bases}
                is_error = any(re.search("(Error|Exception)$", each) for each in bases)
                if is_error and not bases & {*kinds} and _mentions(node, "offenders"):
                    found.append(f"{module}.{node.name} does not derive from {base}")
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                kind = ast.unparse(node.exc.func).split(".")[-1]
                if kind not in kinds and _mentions(node.exc, "offenders"):
                    found.append(f"{module} raises {kind} for offenders (line {node.lineno})")
    return found


def _mentions(node: ast.AST, word: str) -> bool:
    return any(
        word in (getattr(each, "id", ""), getattr(each, "attr", ""), getattr(each, "arg", ""))
        for each in ast.walk(node)
    )


def imports_among_tests(sources: Mapping[str, str]) -> list[str]:
    """Test files that import another test file instead of a helper."""
    found = []
    for path, source in sources.items():
        for node, _ in _statements(ast.parse(source), "always"):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *names] if node.level else [node.module or ""]
            found += [
                f"{path} imports {name}"
                for name in names
                if any(part.startswith("test_") for part in name.split("."))
            ]
    return found
