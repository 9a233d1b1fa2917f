"""Counts the public names that the API reference documents; a missing one is a warning.

Public are the names in `__all__` of the modules below. With `-W` the build fails where one is
missing, or where the docstring of a public function lacks its arguments or its result.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

MODULES = [
    "rmjax",
    "rmjax.data",
    "rmjax.evaluation",
    "rmjax.machines",
    "rmjax.memoria",
    "rmjax.models",
    "rmjax.schedules",
    "rmjax.serve",
]
log = logging.getLogger(__name__)


def public_names() -> list[tuple[str, str]]:
    """(module, name) of every public name."""
    modules = [importlib.import_module(module) for module in MODULES]
    return [(m.__name__, name) for m in modules for name in m.__all__]


def faults(value: object) -> Iterator[str]:
    """What the docstring of a function lacks: the section of its arguments, or of its result."""
    if not inspect.isfunction(value):
        return
    text, signature = inspect.getdoc(value) or "", inspect.signature(value)
    entries = re.findall(
        r"^  ([*\w][*\w, ]*)(?: \([^)]*\))?:", text.partition("Args:")[2], re.MULTILINE
    )
    documented = {name.strip("* ") for entry in entries for name in entry.split(",")}
    for name in signature.parameters:
        if name not in documented:
            yield f"no text for the argument {name!r}"
    if signature.return_annotation not in (None, "None") and "Returns" not in text:
        yield "no text for the result"


def undocumented(documented: set[str]) -> list[str]:
    """The public names that are missing; a value may be documented by another of its names."""
    names = public_names()
    get = lambda module, name: getattr(importlib.import_module(module), name)
    values = [get(m, n) for m, n in names if f"{m}.{n}" in documented]
    return [
        f"{module}.{name}"
        for module, name in names
        if f"{module}.{name}" not in documented
        and not any(get(module, name) is value for value in values)
    ]


def check(app: Sphinx, env: BuildEnvironment) -> None:
    """Warns of what is missing, and prints the count."""
    missing = undocumented(set(env.get_domain("py").objects))
    for name in missing:
        log.warning("API reference: %s is public, and no page of docs/api documents it", name)
    names = public_names()
    for module, name in names:
        for fault in faults(getattr(importlib.import_module(module), name)):
            log.warning("API reference: %s.%s: %s", module, name, fault)
    print(f"API reference: {len(names) - len(missing)} of {len(names)} public names")


def setup(app: Sphinx) -> dict:
    """Connects to the end of reading."""
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
