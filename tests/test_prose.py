"""Documents and docstrings are plain: short sentences, no inverted openings, plain names.

`python -m tests.prose` counts the hits file by file; with the name of a file it prints them.
"""

from __future__ import annotations

import importlib

import pytest

from tests import prose


def test_documents_and_docstrings_are_plain():
    hits = prose.hits(prose.files())
    lines = [f"{hit.path}:{hit.line}: {hit.fault}: {hit.text}" for hit in hits]
    assert not lines, "\n".join(lines)


LONG = "The memory of a stream " + "and of a stream " * 6 + "is read."


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (LONG, "31 words"),
        ("A word. Of long documents, the latest are kept.", "opening"),
        ("Told at the end, the loss is a mean.", "opening"),
        ("- Kept for readers that attend.", "opening"),
        ("The loss falls — it never rises.", "dash"),
        (f"![{LONG}](a.svg)", "31 words"),
    ],
)
def test_a_fault_is_a_hit(text, fault):
    assert [name for name, _ in prose.faults(text)] == [fault]


@pytest.mark.parametrize(
    "text",
    [
        "A short sentence. " * 9,
        "It takes `python -m rmjax.main " + "--flag " * 30 + "` as it is.",
        "Kinds: " + ", ".join(f"kind {i}" for i in range(20)) + ".",
        "See [a page](https://example.org/of/a/long/path) and ![a picture](a.svg).",
        "Stored outputs stay, e.g. those of Park et al. 2020, as they are.",
        "The words of it are offered.",
    ],
)
def test_code_lists_and_links_are_no_faults(text):
    assert not [*prose.faults(text)]


def test_tables_code_and_headings_are_left_out_and_lines_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        f"# Of a heading\n\n| Of a cell |\n|---|\n\n    Of code\n\n```\nOf code\n```\n\n{LONG}\n"
    )
    assert [(hit.path, hit.line, hit.fault) for hit in prose.hits([page])] == [
        ("page.md", 12, "31 words"),
        ("page.md", 12, f"{len(LONG)} columns"),
    ]


def test_an_argument_without_a_text_is_a_fault(monkeypatch):
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(str(prose.ROOT / "docs"))
    coverage = importlib.import_module("extensions.coverage")

    def run(k, keys, *rest, **more) -> int:
        """Runs.

        Args:
          keys: some, as k is one.
          *rest, **more: the others.
        """

    assert [*coverage.faults(run)] == ["no text for the argument 'k'", "no text for the result"]


CODE = '''
"""A module."""


def run(told, rest):
    """Runs.

    Args:
      told: Told to stop.
      rest: one thing; {many} another thing; {many} a third thing.
    """
    its = rest
    return dict(now=its)
'''.format(many="and one more thing " * 4)


def test_docstrings_and_names_of_code_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    module = tmp_path / "module.py"
    module.write_text(CODE)
    seen = [(hit.line, hit.fault, hit.text) for hit in prose.hits([module])]
    names = [(5, "name", "told"), (12, "name", "its"), (13, "name", "now")]
    assert sorted(seen) == sorted([(9, "opening", "Told to stop."), *names])
