"""Makes the pages of docs/results, and the tables of README.md, from the records of results.

    python docs/ledger.py            # writes docs/results/*.md, and the tables of README.md
    python docs/ledger.py --check    # names what is out of date, and exits with 1

A record is docs/results/records/<name>.json; rmjax/tools/ledger.py describes its fields. README.md
has tables between `<!-- ledger: NAME -->` and `<!-- /ledger -->`. NAME is a table of
docs/results/readme.json, or a record: then its first table is shown, without the values of seeds.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from rmjax.tools import ledger
from rmjax.tools.tables import TABLES

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "results" / "records"
REFERENCE = re.compile(r"\{([^{}]+)\}")
MARKED = re.compile(r"(<!-- ledger: (\S+) -->\n).*?(<!-- /ledger -->)", re.DOTALL)


def records(folder: Path = RECORDS) -> dict[str, ledger.Record]:
    """All records by name, in the order of their names."""
    return {path.stem: ledger.read(path) for path in sorted(folder.glob("*.json"))}


def page(name: str, record: ledger.Record) -> str:
    """The page of a record, in Markdown."""
    seeds = record["seeds"]
    if not isinstance(seeds, str):
        seeds = ", ".join(map(str, seeds))
    head = f"# {record['title']}\n\n% Made by docs/ledger.py from records/{name}.json.\n\n"
    parts = [
        wrapped(f"**{label}.** {text}")
        for label, text in [
            ("Question", record["question"]),
            ("Setting", record["setting"]),
            ("Seeds", seeds),
        ]
        if text
    ]
    if record["commands"]:
        lines = "\n".join(record["commands"])
        parts.append(f"## Commands\n\n```sh\n{lines}\n```")
    if record.get("figure"):
        parts.append(f"![{record['title']}]({record['figure']})")
    if record["tables"]:
        parts.append("## Numbers")
    for table in record["tables"]:
        if table.get("name"):
            parts.append(f"### {table['name']}")
        if table.get("text"):
            parts.append(wrapped(table["text"]))
        parts.append(ledger.markdown(ledger.grid(table)).rstrip())
    for heading, points in [
        ("What the numbers show", record["shows"]),
        ("What they do not show", record["not_shown"]),
    ]:
        if points:
            parts.append(f"## {heading}\n\n" + "\n".join(wrapped(p, "- ") for p in points))
    if record.get("notes"):
        parts.append("## Notes\n\n" + "\n\n".join(map(wrapped, record["notes"])))
    return head + "\n\n".join(parts) + "\n"


def wrapped(text: str, bullet: str = "") -> str:
    """Text in lines of 100 columns; text that has line breaks of its own stays as it is."""
    if "\n" in text:
        return text
    return textwrap.fill(
        text, 100, initial_indent=bullet, subsequent_indent=" " * len(bullet),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def readme_table(name: str, known: dict[str, ledger.Record], tables: dict) -> str:
    """A table of README.md.

    Args:
      name: of a table of readme.json, or of a record.
      known: all records.
      tables: {name: rows} of readme.json. In a cell, `{clicks|GRU|AUC}` stands for the number of a
        record: record (`cm1#discrete` names one of its tables), row and column; a fourth part
        `paper` asks for the paper's number. `{paper:rm2|RM|narrativeqa|test_mrr}` stands for a
        number of rmjax/tools/tables.py: table, row, setting or data, and measure.

    Returns:
      The table in Markdown.

    Raises:
      ValueError: there is no such table, or no such number.
    """
    if name in tables:
        rows, put = tables[name], lambda match: number(match[1], known)
        head = list(rows[0])
        cells = [[REFERENCE.sub(put, row[column]) for column in head] for row in rows]
        return ledger.markdown([head, *cells])
    if name not in known:
        listed = ", ".join([*tables, *known])
        raise ValueError(f"README.md: no table or record is named {name!r}; there are {listed}")
    head, *rows = ledger.grid(known[name]["tables"][0])
    keep = [i for i, column in enumerate(head) if not column.endswith(", by seed")]
    return ledger.markdown([[row[i] for i in keep] for row in [head, *rows]])


def number(reference: str, known: dict[str, ledger.Record]) -> str:
    """The number that a reference stands for, see `readme_table`."""
    place, row, column, *part = reference.split("|")
    try:
        if place.startswith("paper:"):
            return f"{TABLES[place.removeprefix('paper:')].rows[row].paper[column][part[0]]:.6g}"
        name, _, heading = place.partition("#")
        tables = known[name]["tables"]
        table = next(t for t in tables if t.get("name", "") == heading or not heading)
        (cell,) = [r[column] for r in table["rows"] if next(iter(r.values())) == row]
        digits = table.get("digits", ledger.DIGITS)
        return ledger.paper(cell, digits) if part else ledger.shown(cell, digits)
    except (KeyError, StopIteration, ValueError) as error:
        raise ValueError(f"docs/results/readme.json: no number at {reference!r}") from error


def filled(text: str, known: dict[str, ledger.Record], tables: dict) -> str:
    """README.md with the tables of the records."""
    fill = lambda match: match[1] + readme_table(match[2], known, tables) + match[3]
    return MARKED.sub(fill, text)


def files(root: Path = ROOT) -> Iterator[tuple[Path, str]]:
    """(path, content) of every file that the records make."""
    folder = root / "docs" / "results"
    known = records(folder / "records")
    for name, record in known.items():
        yield folder / f"{name}.md", page(name, record)
    tables = json.loads((folder / "readme.json").read_text())
    readme = root / "README.md"
    yield readme, filled(readme.read_text(), known, tables)


def main(argv: list[str]) -> int:
    """Writes the files; with --check names those that differ, and returns 1 if there are any."""
    old = [(p, text) for p, text in files() if not p.exists() or p.read_text() != text]
    for path, text in old:
        print(f"{path.relative_to(ROOT)}: {'out of date' if '--check' in argv else 'written'}")
        if "--check" not in argv:
            path.write_text(text)
    if old and "--check" in argv:
        print("Run: python docs/ledger.py")
    return int(bool(old) and "--check" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
