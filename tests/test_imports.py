"""Imports point one way, without cycles; data needs no machines; nothing imports TensorFlow."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

TIERS = [
    {"types", "registry", "io"},
    {"layers", "schedules"},
    {"config", "data", "memoria", "rehearsal", "reason"},
    {"machines", "models", "evaluation"},
    {"tasks"},
    {"run", "command_line"},
    {"tools", "serve"},
    {
        "main", "bench", "ablate", "export", "generate", "import_streams", "load", "load_test",
        "recommend", "reshard",
    },
]  # fmt: skip
LEVEL = {name: level for level, names in enumerate(TIERS) for name in names}
CORE = ("layers", "machines", "memoria", "rehearsal", "reason", "models")
APART = {"rmjax.memoria.saving", "rmjax.models.huggingface"}  # these read and write files
MOVED = {  # old names of modules, which forward to the new ones
    "rmjax.environment", "rmjax.train", "rmjax.streams", "rmjax.segments", "rmjax.checkpoint",
    "rmjax.data.simulated_clicks",
}  # fmt: skip
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "rmjax").rglob("*.py"))
}


def names_imported(path: Path, package: list[str]) -> set[str]:
    """Full names that a file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def package_of(module: str) -> list[str]:
    """The package that a module's relative imports begin from."""
    names = module.split(".")
    return names if FILES[module].name == "__init__.py" else names[:-1]


@functools.cache
def imports(module: str) -> frozenset[str]:
    """The modules of rmjax that a module imports."""
    names = names_imported(FILES[module], package_of(module))
    ours = {n if n in FILES else n.rpartition(".")[0] for n in names if n.split(".")[0] == "rmjax"}
    return frozenset(ours & FILES.keys() - {module, "rmjax"})


def part(module: str) -> str:
    """'rmjax.data.source' -> 'data'."""
    return (module.split(".") + [""])[1]


def allowed(importer: str, imported: str) -> bool:
    return importer == imported or LEVEL[imported] < LEVEL[importer]


def test_every_part_has_a_tier():
    parts = {part(module) for module in FILES.keys() - {"rmjax", "rmjax._moved", *MOVED}}
    assert parts == LEVEL.keys()


@pytest.mark.parametrize("module", sorted(FILES.keys() - {"rmjax", *MOVED}))
def test_imports_point_one_way(module):
    others = imports(module) - {"rmjax._moved"}
    wrong = {name for name in others if not allowed(part(module), part(name))}
    assert not wrong, f"{module} must not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("module", sorted(MOVED))
def test_modules_that_moved_only_forward(module):
    assert imports(module) == {"rmjax._moved"}


def modules_after(code: str) -> set[str]:
    """The top names of the modules that Python has imported after a program."""
    line = f"{code}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", line]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", [m for m in FILES if part(m) in CORE and m not in APART])
def test_the_core_imports_no_library_for_files(module):
    names = names_imported(FILES[module], package_of(module))
    roots = {name.split(".")[0] for name in names}
    assert not {"absl", "grain", "orbax", "tensorflow_datasets"} & roots


def test_imports_bring_no_more_than_they_need():
    core = [m for m in FILES if part(m) in CORE and m not in APART | {"rmjax.memoria.plots"}]
    files = {"orbax", "grain", "tensorflow_datasets"}
    assert not files & modules_after(f"import {', '.join(core)}")
    assert not {"jax", *files} & modules_after("import rmjax")
    serving = "import rmjax.serve; rmjax.serve.open_model, rmjax.serve.Streams"
    assert not {"optax", "grain", "tensorflow_datasets"} & modules_after(serving)


def test_the_plain_scan_imports_no_triton():
    """JAX deprecates the Triton part of Pallas, so only the fused scan may need it."""
    code = "import sys; from rmjax import machines; machines.make('rehearsal', 9, dim=8); assert "
    code += "'jax.experimental.pallas' not in sys.modules"
    assert "jax" in modules_after(code)


def test_there_are_no_import_cycles():
    graph = {module: imports(module) for module in FILES}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_data_needs_no_machines():
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


@pytest.mark.parametrize(
    ("module", "name", "place"),
    [
        ("rmjax.train", "trained", "rmjax.run.training"),
        ("rmjax.train", "Preempted", "rmjax.run.stages"),
        ("rmjax.train", "show", "rmjax.run.evaluate"),
        ("rmjax.streams", "Streams", "rmjax.serve.store"),
        ("rmjax.segments", "segment", "rmjax.data.segments"),
        ("rmjax.checkpoint", "Checkpoints", "rmjax.io.checkpoint"),
        ("rmjax.environment", "prepare", "rmjax.run.environment"),
        ("rmjax.data.simulated_clicks", "SimulatedClicks", "rmjax.data.clicks.simulated"),
        ("rmjax.export", "write_export", "rmjax.serve.export"),
    ],
)
def test_old_names_forward_with_a_warning(module, name, place):
    with pytest.warns(DeprecationWarning, match=re.escape(f"{module}.{name} is now {place}")):
        value = getattr(importlib.import_module(module), name)
    assert value is getattr(importlib.import_module(place), name)


def test_a_renamed_function_forwards_too():
    with pytest.warns(DeprecationWarning, match="is now rmjax.serve.load_test.run_test"):
        assert importlib.import_module("rmjax.load").load_test.__name__ == "run_test"
