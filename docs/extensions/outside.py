"""Links to files beside the folder docs, where the site has a page of them.

The source of a page links to `../notebooks/memoria.ipynb`, which is right in the repository. The
site has the notebooks below docs, through a link to their folder.
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx

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
    down = "../" * depth
    text = re.sub(rf"\]\({up}(notebooks/[^)]*\.ipynb)", rf"]({down}\1", text)
    for file, page in PAGES.items():
        text = re.sub(rf"\]\({up}{re.escape(file)}", f"]({down}{page}", text)
    return text


def read(app: Sphinx, name: str, source: list[str]) -> None:
    """Changes the links of a page before it is parsed."""
    source[0] = within(source[0], name.count("/"))


def setup(app: Sphinx) -> dict:
    """Connects to the reading of a page."""
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
