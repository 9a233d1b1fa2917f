"""Documents the fields of dataclasses and named tuples, with their shapes.

A field's text is the string below it, or the comment on its line or above it. Autodoc reads
neither comments without a colon, nor the sections of a field's docstring.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
from typing import NamedTuple

from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring


class Field(NamedTuple):
    """A field: its name, the text of its annotation, and its description."""

    name: str
    annotation: str
    text: str


def has_fields(value: object) -> bool:
    """Whether a class is a dataclass or a named tuple."""
    return inspect.isclass(value) and (
        dataclasses.is_dataclass(value) or (issubclass(value, tuple) and hasattr(value, "_fields"))
    )


def is_settings(kind: type) -> bool:
    """Whether a class has the keys of a kind, see `rmjax.setting`."""
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return any("field" in field.metadata for field in fields)


def fields_of(kind: type) -> list[Field]:
    """The public fields of a dataclass or a named tuple, in their order."""
    source = textwrap.dedent(inspect.getsource(kind))
    comments = {}  # {line: comment}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
    lines = source.splitlines()
    body = ast.parse(source).body[0].body
    made = []
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or node.target.id.startswith("_"):
            continue
        is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        text = inspect.cleandoc(following.value.value) if is_text else comments.get(node.end_lineno)
        line = node.lineno - 1
        above = []
        while not text and lines[line - 1].strip().startswith("#"):
            above.insert(0, comments[line])
            line -= 1
        made.append(Field(node.target.id, ast.unparse(node.annotation), text or " ".join(above)))
    return made


def describe(app: Sphinx, what: str, name: str, value: object, options, lines: list[str]) -> None:
    """Adds the fields to the docstring of a class."""
    if not has_fields(value) or any(":ivar" in line for line in lines):
        return
    if any("Alias for field number" in line or "alias for field" in line for line in lines):
        lines.clear()
    for field in fields_of(value):
        if not field.text and is_settings(value):
            continue  # its meaning is in a table of keys
        text = [escaped(line) for line in field.text.splitlines()]
        text = GoogleDocstring(text, app.config, app, "function").lines()
        lines += ["", f".. py:attribute:: {field.name}", f"   :type: {field.annotation}", ""]
        lines += [f"   {line}" for line in text]
    lines.append("")


def escaped(line: str) -> str:
    """A line whose text, such as the d of `dim: d.`, does not begin a list."""
    return re.sub(r"^(\s+\w+: [A-Za-z])\.(?=\s|$)", r"\1\\.", line)


def escape(app: Sphinx, what: str, name: str, value: object, options, lines: list[str]) -> None:
    """Escapes the lines of a docstring."""
    lines[:] = map(escaped, lines)


def setup(app: Sphinx) -> dict:
    """Connects to autodoc, before and after napoleon."""
    app.connect("autodoc-process-docstring", escape, priority=100)
    app.connect("autodoc-process-docstring", describe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
