"""Makes docs/configuration.md from the schema of the config.

python docs/configuration.py            # writes the page
python docs/configuration.py --check    # exits with 1 if the page is out of date
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from rmjax.config import SCHEMA
from rmjax.registry import REGISTRIES, Field, anything, expected
from rmjax.tools import ledger

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Configuration

% Made by docs/configuration.py from rmjax/config.py and the settings of all kinds.

Every key is a flag: `--config.machine.slots=10`. A card (`configs/*.py`) sets keys, and a flag
changes one. For a misspelt key the error names the nearest right one. A key that the run does not
read is refused, unless `--unread=warn` is set. `--help` prints this list, and `--list` prints all
kinds. `--list=machine.rehearsal` prints the keys of one kind, and `--list=train` those of a
section.

"""


def sections(schema: Mapping[str, Field] = SCHEMA) -> dict[str, list[list[str]]]:
    """{section: rows of key, default, values, meaning}; the section of a bare key is ''."""
    made: dict[str, list[list[str]]] = {}
    for name, field in schema.items():
        section = name.rpartition(".")[0]
        values = "" if field.check is anything else expected(field)
        row = [f"`{name}`", f"`{field.default!r}`", values, field.doc]
        made.setdefault(section, []).append(row)
    return made


def page() -> str:
    """The page in Markdown."""
    parts = [HEAD]
    for section, rows in sections().items():
        parts.append(f"## {section or 'seed'}\n\n")
        parts.append(ledger.markdown([["key", "default", "values", "meaning"], *rows]) + "\n")
    parts.append("## Kinds\n\n")
    kinds = [[f"`{r.section}`", ", ".join(f"`{kind}`" for kind in r)] for r in REGISTRIES]
    parts.append(ledger.markdown([["registry", "kinds"], *kinds]))
    return "".join(parts)


def main(argv: list[str]) -> int:
    """Writes the page; with --check returns 1 if it is out of date."""
    text = page()
    if PAGE.exists() and PAGE.read_text() == text:
        return 0
    if "--check" in argv:
        print("docs/configuration.md is out of date; run: python docs/configuration.py")
        return 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
