"""The ids of the items of a run: a row of an item table must stay the row of the same item.

A source may number its items otherwise than the run did. If both have ids from outside, such as
movieIds, rows can be moved to the place of their id. Otherwise items are compared as far as the
source describes them, and a run on other items is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from rmjax.data.source import Description, Source, id_array
from rmjax.io import text
from rmjax.run.kept import read_config

if TYPE_CHECKING:
    from rmjax.data.texts.streams import Texts

FILE = "items.jsonl"
PAIRS = 1 << 20  # pairs of neighbours whose rows are in memory at once
_IDS = "ids "  # the digest of ids from outside begins with this


def account(source: Source | Texts) -> dict[str, object]:
    """A short account of the data, which config.json keeps as `data.found`.

    Args:
      source: the data.

    Returns:
      The kind of source, its numbers of items and examples, and the digest of its words.
    """
    sizes = {split: source.size(split) for split in ("train", "valid", "test")}
    kind: dict[str, object] = {"source": type(source).__name__, "items": source.num_items}
    return kind | sizes | words_digest(source)


def words_digest(source: Source | Texts) -> dict[str, str]:
    """A digest of the words and answers that ids and classes stand for.

    Args:
      source: the data.

    Returns:
      {"words": digest}; {} if the source has no vocabulary.
    """
    if not source.vocabulary:
        return {}
    words = json.dumps([list(source.vocabulary), list(source.classes)])
    return {"words": hashlib.sha256(words.encode()).hexdigest()[:16]}


def numbering_digest(source: Source | Texts) -> dict[str, str]:
    """A short form of what item ids stand for, see `Source.numbering`.

    Args:
      source: the data.

    Returns:
      {"numbering": digest of the ids from outside, or the source's own text}; {} if unknown.
    """
    if source.numbering is None:
        return {}
    ids = outside_ids(source)
    return {"numbering": str(source.numbering) if ids is None else _digest(ids.tolist())}


def outside_ids(source: Source | Texts) -> np.ndarray | None:
    """The ids from outside of a source's items, see `id_array`; None if they have none."""
    ids = source.numbering
    return None if ids is None or isinstance(ids, str) else id_array(np.asarray(ids).tolist())


def _digest(ids: list[int] | list[str]) -> str:
    return f"{_IDS}{hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]}"


def item_lines(source: Source | Texts) -> str:
    """The text of items.jsonl.

    Args:
      source: the data; its items have ids from outside.

    Returns:
      One line of JSON for each item.
    """
    ids = outside_ids(source)
    assert ids is not None
    columns = {"index": range(source.num_items), "id": ids.tolist()}
    if source.popularity is not None:
        columns["count"] = source.popularity.tolist()
    rows = zip(*columns.values(), strict=True)
    return "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)


def read_items(workdir: Path, digest: str) -> tuple[list[int] | list[str], tuple[int, ...]]:
    """Reads items.jsonl.

    Args:
      workdir: of the run.
      digest: what the digest of the ids must be.

    Returns:
      The ids from outside, in the run's order; and the counts, () if the source counted no items.

    Raises:
      ValueError: items.jsonl is missing, or is not what the run wrote.
    """
    path = workdir / FILE
    try:
        lines = text.read_text(path).strip().replace("\n", ",")
        rows = json.loads(f"[{lines}]")  # at once: a million lines one by one take seconds
        ids = [row["id"] for row in rows]
        counts = tuple(row["count"] for row in rows if "count" in row)
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        ids, counts = [], ()
    if _digest(ids) != digest:
        raise ValueError(
            f"{path} is missing or was changed, so items cannot be compared: restore it"
        )
    return ids, counts


def with_items(workdir: Path, description: Description) -> Description:
    """Completes a description with the ids and counts of items.jsonl.

    Args:
      workdir: of the run.
      description: its numbering may be the digest of the ids.

    Returns:
      The description, with the ids.

    Raises:
      ValueError: as `read_items`.
    """
    digest = description.numbering
    if not isinstance(digest, str) or not digest.startswith(_IDS):
        return description
    ids, counts = read_items(workdir, digest)
    numbering: Any = tuple(ids)
    counts = counts if description.questions.answer == "item" else ()
    return dataclasses.replace(description, numbering=numbering, popularity=counts)


def match_items(
    workdir: Path, source: Source | Texts, name: str, new_items: str = "refuse"
) -> np.ndarray | None:
    """Finds the rows of a source's items in the tables of a run.

    Args:
      workdir: of the run.
      source: the data.
      name: what errors call the run.
      new_items: 'refuse' is an error if the items differ; see `config.train.new_items`.

    Returns:
      i64 [num_items], the run's row of every item, -1 for a new one; None if every row is in its
      place. Also None, with a warning, if the run kept no ids and has as many items; and None if
      nothing was trained in the workdir, which is an error for the callers that need parameters.

    Raises:
      ValueError: words, answers or items differ; says how many items are missing or new, and names
        some.
    """
    if not (workdir / "config.json").exists():
        return None
    trained_on = read_config(workdir)[1]
    cure = "use the data it was trained on"
    if words_digest(source).get("words") != trained_on.get("words"):
        raise ValueError(
            f"config.data has other words or answers than {name} was trained on: {cure}"
        )
    before, digest = trained_on.get("numbering"), numbering_digest(source).get("numbering")
    if before and before == digest:
        return None
    if all(str(numbering).startswith(_IDS) for numbering in (before, digest)):
        ids = outside_ids(source)
        assert ids is not None
        kept = read_items(workdir, str(before))[0]
        return _rows_of(kept, ids.tolist(), name, new_items == "refuse")
    if trained_on.get("items", source.num_items) != source.num_items:
        sizes = f"data of {trained_on['items']} items, config.data has {source.num_items}"
        raise ValueError(f"{name} was trained on {sizes}: {cure}")
    if before and digest:
        raise ValueError(
            f"{name} was trained on items of {before}; config.data has {digest}: {cure}"
        )
    if digest:
        logging.warning("%s kept no item ids: only the number of items could be compared.", name)
    return None


def _rows_of(
    old: list[int] | list[str], new: list[int] | list[str], name: str, refuse: bool
) -> np.ndarray:
    """The row in `old` of every id in `new`, or -1.

    Raises:
      ValueError: no id is in both; or, with `refuse`, some id is not.
    """
    row = {id_: k for k, id_ in enumerate(old)}
    missing, fresh = sorted({*old}.difference(new)), sorted({*new}.difference(old))
    if (missing or fresh) and refuse:
        raise ValueError(
            f"{name} was trained on other items: {_some(missing)} of its {len(old):,} ids are not "
            f"in config.data, and {_some(fresh)} ids of config.data are new: use the data it was "
            "trained on, or set config.train.new_items with config.train.start_from"
        )
    common = len(new) - len(fresh)
    if not common:
        shown = f"the run's ids are like {old[0]!r}, those of config.data like {new[0]!r}"
        cure = "bring ids to the same form, or train without config.train.start_from"
        raise ValueError(f"{name} has no item of config.data: {shown}: {cure}")
    if 2 * common < min(len(old), len(new)):
        text = "%s: only %d of its %s ids are in config.data: are ids of one form in both?"
        logging.warning(text, name, common, f"{len(old):,}")
    if missing or fresh:
        text = "%s: %s ids are new, and %s of its %s ids are in the data no more."
        logging.info(text, name, _some(fresh), _some(missing), f"{len(old):,}")
    return np.array([row.get(id_, -1) for id_ in new])


def _some(ids: list[int] | list[str]) -> str:
    """The number of ids, and the first three."""
    return f"{len(ids):,} (such as {', '.join(map(str, ids[:3]))})" if ids else "0"


def refuse_other_items(workdir: Path, source: Source | Texts) -> None:
    """Checks that a source has the items of a run, in the same order.

    Args:
      workdir: of the run.
      source: the data.

    Raises:
      ValueError: the items differ, or their order does.
    """
    if match_items(workdir, source, str(workdir)) is not None:
        cure = "use another --workdir, and this one as config.train.start_from"
        raise ValueError(f"{workdir} holds a run on the same items in another order: {cure}")


def move_rows(old: np.ndarray, rows: np.ndarray, fresh: np.ndarray) -> np.ndarray:
    """Reorders an array with one row for each item.

    Args:
      old: [items of the other run, ...].
      rows: i64 [num_items], the row of `old` that each place receives; -1: that of `fresh`.
      fresh: [num_items, ...].

    Returns:
      [num_items, ...].
    """
    known = (rows >= 0).reshape(-1, *[1] * (old.ndim - 1))
    return np.where(known, old[rows], fresh)


def mean_of_neighbours(
    table: np.ndarray, pairs: tuple[np.ndarray, np.ndarray], new: np.ndarray
) -> np.ndarray:
    """Begins the rows of new items at the mean of the rows of their neighbours.

    Args:
      table: [num_items, ...], one row for each item.
      pairs: of `Source.neighbours`.
      new: bool [num_items].

    Returns:
      The table. New items without neighbours keep their rows.
    """
    item, neighbour = pairs
    count = np.bincount(item, minlength=len(table))
    total = np.zeros(table.shape, np.float64)
    for begin in range(0, len(item), PAIRS):
        part = slice(begin, begin + PAIRS)
        np.add.at(total, item[part], table[neighbour[part]])
    mean = total / np.maximum(count, 1).reshape(-1, *[1] * (table.ndim - 1))
    begins = (new & (count > 0)).reshape(-1, *[1] * (table.ndim - 1))
    return np.where(begins, mean, table).astype(table.dtype)
