"""README.md and the guide do what they say: code runs, flags and files exist, links lead somewhere.

README.md runs from top to bottom in one folder, at tiny sizes by the flags of `MORE`. The commands
of `PARSED` are read alone. The commands of the guide are read: their flags, values and files.
"""

from __future__ import annotations

import ast
import configparser
import functools
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from rmjax import command_line
from rmjax import config as configs
from rmjax.registry import expected, wrong
from rmjax.serve.http.app import ENDPOINTS
from rmjax.tools.tables import BUILT, TABLES, table_of
from tests import (
    ROOT,
    decayed,  # noqa: F401  registers the machine of docs/guide/memory.md
    documents,
)
from tests.documents import Block, Command

README = ROOT / "README.md"
PAGES = documents.pages()
STEPS = "--config.train.steps=2 --config.train.batch_size=8 --config.train.eval_batch_size=8"
MORE = {  # part of a command of README.md -> flags that make it tiny
    "configs/xlong.py:local,few": f"{STEPS} --config.data.simulated.train=16 "
    "--config.data.simulated.valid=8 --config.data.simulated.test=8",
    "examples/shop_log.py": "--users=40 --items=30 --shortest=25 --longest=30",
    "configs/clicks.py:local": f"{STEPS} --config.data.cache_dir=cache "
    "--config.rehearsal.recollection=0. --config.rehearsal.familiarity=0.",
    "rmjax.recommend": "",
    "rmjax.serve": "--port=0 --max_users=1 --max_items=10 --cache=64",
}
PARSED = {  # part of a command of README.md -> why it does not run
    "-m venv": "makes an environment",
    "pip install": "needs a registry of packages",
    ".venv/bin/pytest": "runs these tests",
}
SHELL = {"cd", "curl", "for", "done", "}", "rand"}  # words of the shell, without flags of ours
PROGRAMS = {"python", "pip", "pytest", "kubectl", "sbatch", "serve", "api", "."} | SHELL


def commands(block: Block) -> list[Command]:
    """The commands of a block; an indented block has some if it begins with a known program."""
    if block.kind != "code" or not block.text.strip():
        return []
    first = block.text.split()[0].removeprefix(".venv/bin/")
    if block.language == "" and first not in PROGRAMS and not first.startswith("launch/"):
        return []
    return list(documents.commands(block))


def inline(block: Block) -> list[Command]:
    """Commands and flags in the text of a paragraph or a table."""
    if block.kind not in ("prose", "table"):
        return []
    spans = re.findall(r"`((?:python -m rmjax|--config|launch/|sbatch|kubectl)[^`]*)`", block.text)
    lines = [s if s[0] != "-" else f"python -m rmjax.main --config=configs/xlong.py {s}"
             for s in (" ".join(span.split()) for span in spans)]  # fmt: skip
    return [c for line in lines for c in documents.commands(Block("code", block.line, line))]


# Reading a command.


def check(command: Command, in_text: bool = False) -> None:
    """Checks that the files and flags of a command exist.

    Args:
      command: the command.
      in_text: it stands in a paragraph or a table: values may be left out.
    """
    words, name = command.words, Path(command.words[0]).name
    if command.module.startswith("rmjax."):
        known = documents.flags_of(command.module) | set(columns(command.module))
        for flag in command.flags:
            own = flag == "help" or {flag, flag.removeprefix("no")} & known
            assert own or flag.startswith("config."), f"{command.module} has no flag --{flag}"
        check_config(command, strict=command.module == "rmjax.main" and not in_text)
        if command.module == "rmjax.ablate":
            check_table(command.flags)
    elif command.module:
        assert importlib.util.find_spec(command.module)
    elif name == "python":
        script = ROOT / words[1]
        assert script.exists(), f"no file {words[1]}"
        for flag in command.flags:
            assert re.search(rf"\b{flag}\b", script.read_text()), f"{words[1]} has no flag --{flag}"
    elif name == "pip":
        for extra in re.findall(r"^\.\[(.*)\]$", " ".join(words[-1:])):
            assert set(extra.split(",")) <= extras(), f"setup.cfg lacks an extra of {extra}"
    elif name == "pytest":
        paths = [word for word in words[1:] if "/" in word]
        assert all((ROOT / path).exists() for path in paths), f"no file: {paths}"
    elif words[0] == "api":
        check_request(words)
    elif words[:2] == ["serve", "run"]:
        script = ROOT / "examples" / f"{words[2].partition(':')[0]}.py"
        assert all(word.partition("=")[0] in script.read_text() for word in words[3:])
    elif words[0] not in PROGRAMS or words[0] in ("sbatch", "kubectl"):
        files = [word for word in words if word.startswith("launch/")]
        assert files or words[0] == "api()", f"unknown program {words[0]!r}: teach it to this test"
        assert all((ROOT / path).exists() for path in files), f"no file: {files}"
        check_config(command, strict=False)


def columns(module: str) -> list[str]:
    """Flags of `rmjax.recommend` that are made in a loop."""
    from rmjax.serve.recommend_all import _COLUMNS

    return list(_COLUMNS.values()) if module == "rmjax.recommend" else []


@functools.cache
def extras() -> set[str]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return set(parser["options.extras_require"])


def check_config(command: Command, strict: bool) -> None:
    """Loads the card, and sets the keys of the flags.

    Args:
      command: the command.
      strict: the run must read every key, and all values must be right together.
    """
    if "import" in command.flags:
        importlib.import_module(command.flags["import"])
    path, _, option = command.flags.get("config", "").partition(":")
    if not path or path == "...":
        return
    assert (ROOT / path).exists(), f"no file {path}"
    config = importlib.import_module(f"configs.{Path(path).stem}").get_config(option)
    for name, text in command.flags.items():
        key = name.removeprefix("config.")
        if key == name:
            continue
        assert key in configs.SCHEMA, f"no key {key}"
        field = configs.SCHEMA[key]
        if text in ("", "...") or text.startswith("<"):
            continue
        value = text == "True" if type(field.default) is bool else type(field.default)(text)
        assert not wrong(field, value), f"{name}={text}: {expected(field)}"
        with config.unlocked():
            config.update_from_flattened_dict({key: value})
    if strict:
        configs.validate(config)
        command_line.refuse_unread(config, command.words)


def check_table(flags: dict[str, str]) -> None:
    """Checks the names of a table, its rows and its settings."""
    assert flags["table"] in {*TABLES, *BUILT}, f"no table {flags['table']}"
    table = table_of(flags["table"])
    for flag, names in {"rows": table.rows, "settings": table.settings}.items():
        for name in filter(None, flags.get(flag, "").split(",")):
            assert name in names, f"--{flag}={name}: the names are {', '.join(names)}"


def check_request(words) -> None:
    """Checks the path and the body of a request to the HTTP service."""
    path = re.sub(r"/users/.*", "/users/{user}", words[1].partition("?")[0])
    method = "POST" if len(words) == 3 else "GET"
    forms = {(one.method, one.path): one.form for one in ENDPOINTS}
    assert (method, path) in forms, f"no endpoint {method} {path}"
    if len(words) == 3:
        msgspec.json.decode(words[2], type=forms[method, path])


PARTS = [
    pytest.param(path, block, id=f"{path.name}:{block.line}")
    for path in PAGES
    for block in documents.blocks(path.read_text())
    if commands(block) or inline(block)
]


@pytest.mark.parametrize(("path", "block"), PARTS)
def test_files_and_flags_of_commands_exist(path, block):
    for command in commands(block):
        check(command)
    for command in inline(block):
        check(command, in_text=True)


# Reading Python, and links.


def names_of(tree: ast.AST) -> dict[str, object]:
    """{name: module or object} of the imports of this repository's modules."""
    known: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "rmjax":
                    known[alias.asname or "rmjax"] = importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OURS:
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                known[alias.asname or alias.name] = getattr(module, alias.name)
    return known


OURS = ("rmjax", "tests", "configs")
PYTHON = [
    pytest.param(path, block, id=f"{path.name}:{block.line}")
    for path in PAGES[1:]
    for block in documents.blocks(path.read_text())
    if block.language in ("python", "json")
]


@pytest.mark.parametrize(("path", "block"), PYTHON)
def test_python_of_the_guide_uses_names_that_exist(path, block):
    if block.language == "json":
        json.loads(block.text)
        return
    tree = ast.parse(block.text, f"{path.name}:{block.line}")
    known = {"rmjax": importlib.import_module("rmjax")} | names_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = known.get(node.value.id)
            assert owner is None or hasattr(owner, node.attr), f"{node.value.id}.{node.attr}"


def test_the_page_of_memories_shows_a_file_that_all_laws_test():
    text = (ROOT / "docs" / "guide" / "memory.md").read_text()
    shown = [block.text for block in documents.blocks(text) if block.language == "python"]
    assert (ROOT / "tests" / "decayed.py").read_text() in shown


def test_python_of_the_pages_on_memoria_runs(tmp_path, monkeypatch):
    """Each page in one namespace; engrams are narrower than on the page, and hardly trained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").write_text("some words of a book, and more. " * 260)
    card = importlib.import_module("configs.books").get_config()
    card.data.dir, card.data.cache_dir, card.model.kind = "books", "cache", "memoria"
    card.model.update(dim=8, layers=1, heads=1)
    card.train.update(steps=1, batch_size=1, eval_batch_size=1, devices=1)
    importlib.import_module("rmjax").fit(card, "runs/books")
    names: dict[str, Any] = {}
    for page in ("memoria", "language"):
        for block in documents.blocks((ROOT / "docs" / "guide" / f"{page}.md").read_text()):
            if block.language == "python":
                text = block.text.replace("768", "16")
                exec(compile(text, f"{page}.md:{block.line}", "exec"), names)  # noqa: S102
        if page == "memoria":
            assert names["short_term"] == 400 and names["weights"].shape == (100,)
            assert np.isnan(names["ages"]).tolist() == [True] * 9 + [False] * 11
    kinds = names["state"].engrams.kind
    assert kinds.shape[0] == 1 and (kinds == 2).sum() == 168
    assert f"{names['config'].capacity}" in str(names["states"].kind.shape)


def anchors(path: Path) -> set[str]:
    """Anchors of the headings of a page, as code hosts and MyST make them."""
    heads = [b.text.lstrip("# ") for b in documents.blocks(path.read_text()) if b.kind == "heading"]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_within_the_repository_lead_somewhere(path):
    parts = [b.text for b in documents.blocks(path.read_text()) if b.kind in ("prose", "table")]
    links = re.findall(r"\]\(([^)\s]+)\)", "\n".join(parts))
    for link in links:
        if re.match(r"\w+://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path.name}: {link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{path.name}: no heading for {link}"


# README.md.


def test_readme_is_short_and_has_its_parts_in_order():
    text = README.read_text()
    lines = text.rstrip("\n").split("\n")
    assert len(lines) <= 150
    long = [b for b in documents.blocks(text) if b.kind == "prose" and "](" not in b.text]
    assert not [line for block in long for line in block.text.split("\n") if len(line) > 100]
    heads = [b.text for b in documents.blocks(text) if b.kind == "heading"]
    assert heads == [
        "# rmjax", "## Why", "## Install and first run", "## In Python", "## Memories",
        "## Tasks", "## Your own data, your own memory", "## Serving and scale",
        "## What you can rely on, and what not", "## Map and documents",
    ]  # fmt: skip
    sentence, picture = [b.text for b in documents.blocks(text) if b.kind == "prose"][:2]
    assert sentence.startswith("**Reasoning after memorizing") and picture.startswith("![")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder like a clone of the repository, for runs."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "examples", "rmjax"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def environment(folder: Path) -> dict[str, str]:
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    once = {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}  # the process does not begin again
    return os.environ | compiled | once | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(folder)}


def run(command: Command, folder: Path) -> str:
    """Runs a command with the flags of `MORE`; returns what it prints."""
    part = next(part for part in MORE if part in command.text)
    words = [sys.executable, *command.words[1:], *MORE[part].split()]
    if "rmjax.serve" in words:
        return serve(words, folder)
    made = subprocess.run(
        words, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=300
    )
    assert made.returncode == 0, made.stderr
    return made.stdout


def serve(words: list[str], folder: Path) -> str:
    """Starts the service, waits until it is ready, and ends it; returns its page."""
    log = folder / "serve.log"
    with log.open("w") as errors:
        process = subprocess.Popen(words, cwd=folder, env=environment(folder), stderr=errors)
    address = None
    try:
        while not (address and ready(address[1])):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
            address = re.search(r"(http://\S+): serves", log.read_text())
        with urllib.request.urlopen(address[1]) as page:
            text = page.read().decode()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    assert process.returncode == 0
    return text


def ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/readyz", timeout=10) as reply:
            return reply.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def table(text: str) -> tuple[list[str], list[str]]:
    """The heads and the names of the rows of the first table in a text, without its rule."""
    head, *rows = [re.split(r"  +", line) for line in text.strip().split("\n\n")[0].split("\n")]
    return head, [row[0] for row in rows if set(row[0]) != {"-"}]


def test_readme_runs_from_top_to_bottom(folder, monkeypatch):
    monkeypatch.chdir(folder)
    printed, ran = "", []
    for block in documents.blocks(README.read_text()):
        place = f"README.md:{block.line}"
        if block.language == "python":
            exec(compile(block.text, place, "exec"), {})  # noqa: S102
            ran.append("python")
        elif commands(block):
            for command in commands(block):
                if not any(part in " ".join(command.words) for part in PARSED):
                    assert any(part in command.text for part in MORE), f"{place}: {command.text}"
                    printed = run(command, folder)
                    ran.append(command.module or command.words[1])
        elif block.kind == "code" and block.text.startswith("memory  "):
            assert table(block.text) == table(printed), f"{place}: the run prints another table"
            ran.append("table")
    main, shop = "rmjax.main", "examples/shop_log.py"
    recommend = ["rmjax.recommend"] * 2  # into a file, and into a store
    assert ran == [main, "table", "python", shop, main, *recommend, "rmjax.serve"]
    assert (folder / "recs.csv").read_text().startswith('"user","rank","item","score"')
    assert "<html" in printed.lower()
