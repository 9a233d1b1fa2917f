"""data.json: the description of a run's data, with which its model opens without the data.

Ids and counts of items are not in it, but in items.jsonl beside it: there may be millions of them.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from rmjax.data import describe, make_source
from rmjax.data.source import Description, Source
from rmjax.io import text
from rmjax.run import items
from rmjax.run.kept import digest_of, write_whole

if TYPE_CHECKING:
    from rmjax.data.texts.streams import Texts

FILE = "data.json"
_ANEW = (
    "restore it from a copy, or remove it and run --mode=eval, which writes it again from the data"
)


def write_description(workdir: Path, config: ConfigDict, source: Source | Texts) -> None:
    """Writes data.json; and items.jsonl, if items have ids from outside and there is no such file.

    Args:
      workdir: of the run.
      config: the section `data` of its config.
      source: its data.
    """
    values = describe(config, source).as_json()
    if items.outside_ids(source) is not None:
        if not (workdir / items.FILE).exists():
            write_whole(workdir / items.FILE, items.item_lines(source))
        values |= items.numbering_digest(source) | {"popularity": ()}
    write_whole(workdir / FILE, json.dumps(values | {"digest": digest_of(values)}))


def read_description(workdir: Path) -> Description | None:
    """Reads data.json.

    Args:
      workdir: of the run.

    Returns:
      The description of its data; None if the run is older than data.json.

    Raises:
      ValueError: data.json is damaged, was changed, or is of another version; names the file.
    """
    path = workdir / FILE
    if not path.exists():
        return None
    values = text.read_json(path)
    if not isinstance(values, dict) or values.pop("digest", None) != digest_of(values):
        raise ValueError(f"{path} was changed after the run wrote it: {_ANEW}")
    try:
        return items.with_items(workdir, Description.from_json(values))
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} is of another version ({error}): {_ANEW}") from error


def description_of(config: ConfigDict, workdir: Path) -> Description:
    """The description of a run's data.

    The data are opened only if the run kept no description; the new one is then kept.

    Args:
      config: of the run.
      workdir: of the run.

    Returns:
      The description.

    Raises:
      FileNotFoundError: the run kept no description, and its data cannot be opened.
      ValueError: data.json was changed, or the data are not those of the run.
    """
    description = read_description(workdir)
    if description is not None:
        return description
    try:
        source = make_source(config.data, config.data.seed)
    except OSError as error:
        place = f"config.data.dir = {config.data.dir!r}"
        raise FileNotFoundError(
            f"{workdir / FILE} is missing, as in runs of earlier versions. It is made from the "
            f"data, which are needed once: put them where the run had them ({place}), or run "
            f"--mode=eval with the right place. {error}"
        ) from error
    items.refuse_other_items(workdir, source)
    with contextlib.suppress(OSError):  # a read-only workdir keeps none
        write_description(workdir, config.data, source)
    return describe(config.data, source)
