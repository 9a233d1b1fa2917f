"""Imports point one way, no module needs itself, data knows nothing of machines, and TensorFlow is not imported."""

from __future__ import annotations

import ast
import functools
import graphlib
from pathlib import Path

import pytest

from tests import ROOT

TIERS = [
    {"types"},
    {"layers", "schedules"},
    {"reason", "rehearsal", "machines", "memoria"},
    {"models"},
    {"tasks"},
    {"train_step"},
    {"train"},
    {"main"},
]
ALSO = {("machines", "reason")}  # within a tier
LEVEL = {name: level for level, names in enumerate(TIERS) for name in names}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "rmjax").rglob("*.py"))
}


def names_imported(path: Path, package: list[str]) -> set[str]:
    """Full names of whatever a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Which of our modules this one imports."""
    package = module.split(".") if FILES[module].name == "__init__.py" else module.split(".")[:-1]
    names = names_imported(FILES[module], package)
    ours = {n if n in FILES else n.rpartition(".")[0] for n in names if n.split(".")[0] == "rmjax"}
    return frozenset(ours & FILES.keys() - {module, "rmjax"})


def part(module: str) -> str:
    return (module.split(".") + [""])[1]


def allowed(importer: str, imported: str) -> bool:
    if importer == imported or (importer, imported) in ALSO or LEVEL.keys().isdisjoint({imported}):
        return True
    return importer not in LEVEL or LEVEL[imported] < LEVEL[importer]


@pytest.mark.parametrize("module", FILES)
def test_imports_point_one_way(module):
    wrong = {name for name in imports(module) if not allowed(part(module), part(name))}
    assert not wrong, f"{module} must not import {', '.join(sorted(wrong))}"


def test_no_module_needs_itself():
    assert list(graphlib.TopologicalSorter({module: imports(module) for module in FILES}).static_order())


def test_data_never_needs_machines():
    reached, todo = set(), [module for module in FILES if part(module) == "data"]
    assert todo
    while todo:
        module = todo.pop()
        if module not in reached:
            reached.add(module)
            todo += imports(module)
    assert not {"machines", "memoria", "models", "tasks"} & {part(module) for module in reached}


def test_nothing_imports_tensorflow():
    for folder in ("rmjax", "configs", "launch", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            roots = {name.split(".")[0] for name in names_imported(path, [folder])}
            assert "tensorflow" not in roots, path
