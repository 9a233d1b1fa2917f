"""Markdown in blocks, and the commands of its code, for the tests of documents."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests import ROOT

ITEM = re.compile(r"(\s*)([-*+]|\d+[.)])\s+")
MODULES = {"serve": "serve/command.py"}  # commands whose flags are not in rmjax/<name>.py


class Block(NamedTuple):
    """A part of a document.

    Attributes:
      kind: "code", "heading", "table", "comment" or "prose"; an item of a list is prose.
      line: number of its first line, from 1.
      text: its lines; code without the indentation and the fences.
      language: of fenced code; '' otherwise.
    """

    kind: str
    line: int
    text: str
    language: str = ""


def blocks(text: str) -> Iterator[Block]:
    """Cuts Markdown into blocks."""
    lines, i, margin = text.split("\n"), 0, 0  # margin: column of the text of a list's item
    while i < len(lines):
        begin, line = i, lines[i]
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            i += 1
            continue
        fence = re.match(r"\s*(`{3,}|~{3,})\s*\{?([\w-]*)", line)
        if fence:
            i += 1
            while i < len(lines) and not lines[i].strip().startswith(fence[1]):
                i += 1
            code = "\n".join(one[indent:] for one in lines[begin + 1 : i])
            yield Block("code", begin + 2, code + "\n", fence[2])
            i += 1
            continue
        margin = 0 if indent == 0 and not ITEM.match(line) else margin
        if indent >= margin + 4 and (begin == 0 or not lines[begin - 1].strip()):
            while i < len(lines) and (not lines[i].strip() or _indent(lines[i]) >= margin + 4):
                i += 1
            code = "\n".join(one[margin + 4 :] for one in lines[begin:i])
            yield Block("code", begin + 1, code.rstrip() + "\n")
            continue
        kind = _kind(line)
        if item := ITEM.match(line):
            margin = item.end()
        i += 1
        if kind != "heading":
            while i < len(lines) and lines[i].strip() and not _begins(kind, lines[i]):
                i += 1
        yield Block(kind, begin + 1, "\n".join(lines[begin:i]))


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _kind(line: str) -> str:
    starts = {"#": "heading", "|": "table", "<!--": "comment", "% ": "comment"}
    return next((kind for mark, kind in starts.items() if line.strip().startswith(mark)), "prose")


def _begins(kind: str, line: str) -> bool:
    """Whether a line begins a new block after lines of a kind."""
    other = _kind(line) != kind or line.lstrip().startswith(("```", "~~~"))
    return other or kind == "comment" or bool(ITEM.match(line))


def prompts(block: Block) -> Iterator[str]:
    """The command lines of a block of code; lines that end with a backslash are joined."""
    if block.kind != "code" or block.language not in ("", "bash", "sh", "shell"):
        return
    for line in block.text.replace("\\\n", " ").split("\n"):
        if re.match(r"\s*(#|$)", line):
            continue
        yield line.strip()


class Command(NamedTuple):
    """One program with its arguments.

    Attributes:
      words: the program and the arguments; variables before it are left out.
      text: the command line that it is from.
    """

    words: Sequence[str]
    text: str

    @property
    def module(self) -> str:
        """The name after `python -m`, such as 'rmjax.main'; '' for other programs."""
        python = Path(self.words[0]).name.startswith("python") and self.words[1:2] == ["-m"]
        return self.words[2] if python else ""

    @property
    def flags(self) -> dict[str, str]:
        """{name: value} of the arguments like --name=value; '' without a value."""
        pairs = [word[2:].partition("=") for word in self.words if word.startswith("--")]
        return {name: value for name, _, value in pairs}


def commands(block: Block) -> Iterator[Command]:
    """The commands of a block; those that `&&`, `;` and `|` join are single ones."""
    for line in prompts(block):
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        for word in [*lexer, ";"]:
            if word and set(word) <= set(";&|"):
                while words and re.fullmatch(r"\w+=.*|do|export|then", words[0]):
                    words.pop(0)
                if words:
                    yield Command(words, line)
                words = []
            else:
                words.append(word)


def flags_of(module: str) -> set[str]:
    """Names of the flags that a command of this library defines, read from its source."""
    name = module.removeprefix("rmjax.")
    entry = ROOT / "rmjax" / MODULES.get(name, f"{name}.py")
    paths = [entry, ROOT / "rmjax" / "command_line.py"]
    for imported in re.findall(r"from rmjax\.([\w.]+) import cli", entry.read_text()):
        paths.append(ROOT / "rmjax" / f"{imported.replace('.', '/')}.py")
    names = set()
    for path in paths:
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if _defines(node)):
            names.add(ast.literal_eval(call.args[0]) if call.args else "")
    return names


def _defines(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    first = node.args[0] if node.args else None
    return node.func.attr.startswith("DEFINE_") and isinstance(first, ast.Constant)


def pages(folder: Path = ROOT) -> list[Path]:
    """README.md and the pages of the guide."""
    return [folder / "README.md", *sorted((folder / "docs" / "guide").glob("*.md"))]
