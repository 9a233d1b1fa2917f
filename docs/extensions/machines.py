"""Writes the page of machines: the docstring of every machine's module, and its settings.

The page `docs/api/machines.md` ends with the line `% machines`. A section for each machine of the
registry takes its place, so no machine can be left out.
"""

from __future__ import annotations

import inspect

from sphinx.application import Sphinx

from rmjax.registry import MACHINES, anything, expected, fields_of
from rmjax.tools import ledger

MARK = "% machines"


def kinds() -> list[str]:
    """The machines of this package."""
    return [k for k in MACHINES if MACHINES[k].settings.__module__.startswith("rmjax.")]


def section(kind: str) -> str:
    """The section of a machine, in Markdown with directives of autodoc."""
    settings, make = MACHINES[kind]
    module = inspect.getmodule(make)
    assert module is not None
    rows = [
        [f"`machine.{key}`", f"`{f.default!r}`", "" if f.check is anything else expected(f), f.doc]
        for key, f in fields_of(settings).items()
    ]
    table = ledger.markdown([["key", "default", "values", "meaning"], *rows])
    directives = [f".. automodule:: {module.__name__}\n   :no-index:"]
    if settings.__doc__ and not settings.__doc__.startswith(f"{settings.__name__}("):
        directives.append(f".. autoclass:: {module.__name__}.Settings()\n   :no-index:")
    inner = "\n\n".join(directives)
    return f"## `{kind}`\n\n```{{eval-rst}}\n{inner}\n```\n\n{table}"


def read(app: Sphinx, name: str, source: list[str]) -> None:
    """Puts the sections in the place of the mark."""
    if name == "api/machines":
        assert MARK in source[0], f"{name}: the line {MARK!r} is missing"
        source[0] = source[0].replace(MARK, "\n".join(map(section, kinds())))


def show_equations(app: Sphinx, what: str, name: str, value: object, options, lines) -> None:
    """Makes indented paragraphs of a module's docstring literal, since they are equations."""
    if what != "module":
        return
    made: list[str] = []
    for line in lines:
        begins = line.startswith("    ") and (not made or not made[-1].strip())
        if begins and not any(old.startswith("    ") for old in made[-2:]):
            made += ["::", ""]
        made.append(line)
    lines[:] = made


def setup(app: Sphinx) -> dict:
    """Connects to the reading of the page, and to autodoc."""
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", show_equations)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
