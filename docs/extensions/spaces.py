"""A mean and its std stay on one line: the spaces around ± do not break."""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx


def join(app: Sphinx, document: nodes.document) -> None:
    """Replaces the spaces around ± in all texts, code excepted."""
    for text in list(document.findall(nodes.Text)):
        if " ± " in text and not isinstance(text.parent, nodes.literal | nodes.literal_block):
            text.parent.replace(text, nodes.Text(text.replace(" ± ", "\u00a0±\u00a0")))


def setup(app: Sphinx) -> dict:
    """Connects to the end of reading a page."""
    app.connect("doctree-read", join)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
