"""Links to files beside the folder docs, where the site has a page of them.

The source of a page links to `../notebooks/memoria.ipynb`, which is right in the repository. The
site has the notebooks below docs, through a symbolic link to their folder, which MyST would leave.
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx

NOTEBOOK = re.compile(r"\[([^]]*)\]\((?:\.\./)*(notebooks/[^)#]*)\.ipynb\)")
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "releases.md"}


def within(text: str, depth: int) -> str:
    """Text whose links out of docs lead to the pages of the site.

    Args:
      text: of a page, in Markdown.
      depth: number of folders between docs and the page.

    Returns:
      The text.
    """
    up = re.escape("../" * (depth + 1))
    for file, page in PAGES.items():
        text = re.sub(rf"\]\({up}{re.escape(file)}", f"]({'../' * depth}{page}", text)
    return NOTEBOOK.sub(lambda m: f"{{doc}}`{m[1].replace('`', '')} </{m[2]}>`", text)


def read(app: Sphinx, name: str, source: list[str]) -> None:
    """Changes the links of a page before it is parsed."""
    source[0] = within(source[0], name.count("/"))


def setup(app: Sphinx) -> dict:
    """Connects to the reading of a page."""
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
