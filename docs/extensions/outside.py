"""Links to files beside the folder docs, where the site has a page of them.

The source of a page links to `../notebooks/memoria.ipynb`, which is right in the repository. The
site has the notebooks below docs, through a symbolic link to their folder, which MyST would leave.
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx

PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "releases.md"}


def within(text: str, name: str) -> str:
    """Text whose links out of docs, and to notebooks, lead to the pages of the site.

    Args:
      text: of a page, in Markdown, or of a notebook.
      name: of the page, such as 'guide/data'.

    Returns:
      The text.
    """
    down = "../" * name.count("/")
    for file, page in PAGES.items():
        text = text.replace(f"](../{down}{file}", f"]({down}{page}")
    folder = "" if name.startswith("notebooks/") else r"(?:\.\./)*notebooks/"
    link = re.compile(rf"\[([^][\n]*)\]\({folder}(\w+)\.ipynb\)")
    return link.sub(lambda m: f"{{doc}}`{m[1].replace('`', '')} </notebooks/{m[2]}>`", text)


def read(app: Sphinx, name: str, source: list[str]) -> None:
    """Changes the links of a page before it is parsed."""
    source[0] = within(source[0], name)


def setup(app: Sphinx) -> dict:
    """Connects to the reading of a page."""
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
