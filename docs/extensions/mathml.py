"""Equations as MathML, which browsers draw without scripts and without a network."""

from __future__ import annotations

from html import escape

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx


def visit_inline(translator, node: nodes.math) -> None:
    """Writes an equation in a line of text."""
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def visit_display(translator, node: nodes.math_block) -> None:
    """Writes an equation on a line of its own."""
    anchor = "".join(f' id="{escape(name)}"' for name in node["ids"][:1])
    equation = convert(node.astext(), display="block")
    translator.body.append(f'<div class="equation"{anchor}>{equation}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict:
    """Adds the renderer `mathml`."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
