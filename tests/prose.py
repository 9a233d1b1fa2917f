"""A check of prose: length of sentences and lines, openings, dashes, and names in code.

    python -m tests.prose                  # counts of hits, file by file
    python -m tests.prose README.md rmjax  # the hits in these files and folders

Code, formulas, tables, headings, links and quoted output do not count. A list of short parts, such
as names between commas, counts as one word a part.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests import ROOT
from tests.documents import Block, blocks

LONGEST = 25  # words of a sentence
COLUMNS = 100  # of a line without a link
SHORT = 3  # words of a part of a list, at most
NAMES = {"found", "there", "told", "its", "said", "here", "whole", "each", "now"}
# "found" is the paper's own name of a set of engrams; "each" is an old argument that still works.
ALLOWED = {("rmjax/memoria/_remind.py", "found"), ("tests/tasks/test_answers.py", "each")}
SECTIONS = r"(Args|Returns|Raises|Attributes|Yields|Note|Notes|Example|Examples):"
# A participle without a subject: "Told at the end, ...", "Kept for readers that ...".
PARTICIPLE = r"Told|Said|Kept|Drawn|Seen|Taken|Held|Asked|Written|Made|Stored|Measured|Found|Given"
AFTER = r"in|on|at|by|to|for|from|with|of|as|while|when|only|alone|once|twice|after|before|beside"
OPENINGS = re.compile(rf"(Of|Nor|So as|Such as)\b|({PARTICIPLE}) ({AFTER})\b")
DASH = re.compile(r"\w[\w)`*.]* (—|–|--) \w")
SHORTENED = r"\b(e\.g|i\.e|et al|Eqs?|Sec|Fig|Figs|vs|cf|approx|Mr|Dr|No|resp)\."
FOLDERS = ("rmjax", "tests", "configs", "examples", "docs")


class Hit(NamedTuple):
    """One fault.

    Attributes:
      path: of the file, in the repository.
      line: where its paragraph or its name begins.
      fault: what is wrong.
      text: the sentence or the name.
    """

    path: str
    line: int
    fault: str
    text: str


def plain(text: str) -> str:
    """The words of a paragraph of Markdown: code and formulas become one word each."""
    text = re.sub(r"`+[^`]*`+(s\b)?", "Code", text)
    text = re.sub(r"\$[^$]+\$", "formula", text)
    text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", text)  # also the words of a picture
    text = re.sub(r"\*\*|__|(?<!\w)[*_](?=\w)|(?<=\w)[*_](?!\w)", "", text)
    text = re.sub(r"^\s*([-*+>]|\d+[.)])\s+", "", text)
    return re.sub(r"\s+", " ", text).strip()


def sentences(text: str) -> list[str]:
    """Cuts a paragraph into sentences."""
    text = re.sub(SHORTENED + r"|\.\.\.", lambda match: match[0].replace(".", "\0"), text)
    parts = re.split(r"(?<=[.!?])[\"')]*\s+|(?<=:)\s+(?=[A-Z])", text)
    return [part.replace("\0", ".") for part in parts]


def words(sentence: str) -> int:
    """The number of words of a sentence; short parts of a list count as one word each."""
    count, run = 0, 0
    for part in re.split(r"[,;]", sentence):
        size = len([word for word in part.split() if re.search(r"\w", word)])
        run = run + 1 if size <= SHORT else 0
        # Two short parts may be a clause between commas; from the third one on it is a list.
        count += 1 if run > 2 else size
    return count


def faults(text: str, entry: bool = False) -> Iterator[tuple[str, str]]:
    """(fault, sentence) of a paragraph.

    Args:
      text: the paragraph.
      entry: it is an entry of Args, Returns or Raises, where semicolons part the items of a list.
    """
    for sentence in sentences(plain(text)):
        length = max(map(words, sentence.split(";"))) if entry else words(sentence)
        if length > LONGEST:
            yield f"{length} words", sentence
        if OPENINGS.match(sentence):
            yield "opening", sentence
        if DASH.search(sentence):
            yield "dash", sentence


def in_document(path: Path) -> Iterator[Hit]:
    """The faults of a document in Markdown."""
    for block in blocks(path.read_text()):
        if block.kind != "prose":
            continue
        yield from _hits(path, block.line, block.text)
        for number, line in enumerate(block.text.split("\n"), block.line):
            linked = "](" in line or "://" in line or line.lstrip().startswith("<")  # HTML
            if len(line) > COLUMNS and not linked:
                yield Hit(str(path.relative_to(ROOT)), number, f"{len(line)} columns", line)


def in_code(path: Path) -> Iterator[Hit]:
    """The faults of the docstrings and the names of a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            text = ast.get_docstring(node)
            if text and isinstance(first, ast.Expr):
                for block in paragraphs(text):
                    line = first.lineno + block.line - 1
                    yield from _hits(path, line, block.text, block.language == "entry")
        place = str(path.relative_to(ROOT))
        for name in _names(node):
            if name in NAMES and (place, name) not in ALLOWED:
                yield Hit(place, node.lineno, "name", name)


def _hits(path: Path, line: int, text: str, entry: bool = False) -> Iterator[Hit]:
    for fault, sentence in faults(text, entry):
        yield Hit(str(path.relative_to(ROOT)), line, fault, sentence)


def _names(node: ast.AST) -> list[str]:
    """The names that a node gives to values: variables, arguments, and keys of calls."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.keyword) and node.arg:
        return [node.arg]
    return []


def paragraphs(text: str) -> Iterator[Block]:
    """The paragraphs of a docstring in Google's form.

    Args:
      text: the docstring, without its indentation.

    Yields:
      Blocks of prose. Those of a section, such as one argument, have the language 'entry'.
    """
    lines, inside, section = [], [], False
    for line in text.split("\n"):
        if re.fullmatch(SECTIONS, line.strip()):
            section, line = True, ""
        elif line and not line.startswith(" "):
            section = False
        elif section:
            entry = re.match(r"  (\*{0,2}\w[\w., *]*|`[^`]+`)( \([^)]*\))?: ", line)
            line = f"- {line[entry.end() :]}" if entry else re.sub("^ {2,4}", "  ", line)
        lines.append("" if re.search(r"\S {3,}\S", line) else line)
        inside.append(section)
    for block in blocks("\n".join(lines)):
        if block.kind == "prose":
            yield block._replace(language="entry" if inside[block.line - 1] else "")


def files(roots: Sequence[str] = ()) -> list[Path]:
    """The documents and modules of the repository, or those below some files and folders."""
    if roots:
        below = [ROOT / root for root in roots]
        paths = [path for root in below for path in ([root] if root.is_file() else root.rglob("*"))]
        return sorted(path for path in paths if path.suffix in (".md", ".py"))
    code = [path for name in FOLDERS for path in (ROOT / name).rglob("*.py")]
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *code])


def hits(paths: Sequence[Path]) -> list[Hit]:
    """All faults of some files."""
    return [h for p in paths for h in (in_code(p) if p.suffix == ".py" else in_document(p))]


def main(roots: Sequence[str]) -> int:
    """Prints the hits in `roots`, or counts file by file; returns 1 if there are any."""
    every = hits(files(roots))
    if roots:
        for hit in every:
            print(f"{hit.path}:{hit.line}: {hit.fault}: {hit.text}")
    else:
        for path in sorted({hit.path for hit in every}):
            print(f"{sum(hit.path == path for hit in every):5} {path}")
    print(f"{len(every):5} in all")
    return 1 if every else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
