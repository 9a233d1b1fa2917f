"""The log lines of a source's splits: their sizes, their files, and a warning of large shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from absl import logging

from rmjax.data.source import SPLITS, Source

SHOWN = 3  # names of files in a line
MUCH = 1.5  # a share that is so many times the one that was asked for gets a warning


def log_splits(
    name: str,
    sizes: Mapping[str, int],
    unit: str,
    files: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Logs the size of each split, its share of all, and its files.

    Args:
      name: of the data, the first word of the lines.
      sizes: {split: its size}.
      unit: what is counted, a plural such as 'tokens'.
      files: {split: names of its files}. None: one line tells all sizes, without files.
    """
    total = max(1, sum(sizes.values()))
    shown = {
        split: f"{split} {size:,} {unit} ({100 * size / total:.3g}%)"
        for split, size in sizes.items()
    }
    if files is None:
        logging.info("%s: %s.", name, ", ".join(shown.values()))
        return
    for split, text in shown.items():
        logging.info("%s: %s from %s.", name, text, some(files[split]))


def log_source(name: str, source: Source, unit: str) -> None:
    """Logs the number of examples of each split, in one line.

    Args:
      name: of the data.
      source: the data.
      unit: what an example is, a plural such as 'clips'.
    """
    log_splits(name, {split: source.size(split) for split in SPLITS}, unit)


def some(names: Sequence[str]) -> str:
    """The words for some files.

    Args:
      names: of the files.

    Returns:
      The name of the only file; or how many files there are, and the first names.
    """
    if len(names) == 1:
        return names[0]
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"{len(names):,} files: {', '.join(names[:SHOWN])}{more}"


def warn_of_shares(
    name: str, sizes: Mapping[str, int], asked: Mapping[str, float], keys: str, cure: str
) -> None:
    """Warns if a held-out split is much larger than the share that a key asks for.

    Args:
      name: of the data, the first word of the line.
      sizes: {split: its size}.
      asked: {split: the share of all that its key asks for}.
      keys: the keys that ask for the shares.
      cure: what to do.
    """
    total = max(1, sum(sizes.values()))
    large = [split for split, share in asked.items() if sizes[split] > MUCH * share * total]
    if large:
        parts = [
            f"{split} takes {100 * sizes[split] / total:.3g}%, not {100 * asked[split]:.3g}%"
            for split in large
        ]
        logging.warning("%s: %s (%s): %s.", name, " and ".join(parts), keys, cure)
