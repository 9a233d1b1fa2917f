"""The histories of all users of a table of events, in the items of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from rmjax.data.tables.events import Events, open_events, prepare, user_ids
from rmjax.data.tables.rows import Columns
from rmjax.io import paths
from rmjax.serve.model import Model

if TYPE_CHECKING:
    import pyarrow as pa


class Histories:
    """What every user of a table did, the oldest event first.

    The line of the log that training prints is printed here too: what was read and left out. Items
    that the model does not know are counted and left out.

    Args:
      model: knows the items.
      events: a file, a folder of files, or a data frame, as `rmjax.open_table` takes it.
      latest: how many of a user's events are read, the latest ones; 0: all.
      columns: fields of `Columns`; the others are those of the model's run.

    Attributes:
      users: their ids, integers or strings [users].

    Raises:
      ValueError: the table has wrong columns or rows; or the model knows none of its items.
      FileNotFoundError: there are no such events.
      Stopped: the process was asked to stop.
    """

    users: pa.Array

    def __init__(
        self,
        model: Model,
        events: Any,
        latest: int = 0,
        columns: Mapping[str, str] | None = None,
    ):
        data = model.config.data
        ours = vars(Columns()).keys() if data.name == "table" else ()
        chosen = {name: getattr(data.table, name) for name in ours} | dict(columns or {})
        if isinstance(events, str):
            events = paths.resolve(events, "events")
        folder = prepare(events, Columns(**chosen), data.cache_dir, data.seed)
        self._log, self.users = open_events(folder), user_ids(folder)
        self._log.report()
        self._index = model.names.indices(self._log.ids)
        _report_unknown(self._index, self._log.ids, model.names.ids)
        self._bounds = np.searchsorted(self._log.users, np.arange(len(self.users) + 1))
        self._streams, self._latest = _latest_streams(self._log), latest
        self._report_read()

    def __len__(self) -> int:
        """Number of users."""
        return len(self.users)

    def read(self, part: slice) -> list[np.ndarray]:
        """The items that are read: those of the latest session, and of it the latest events.

        Args:
          part: of `users`.

        Returns:
          Indices of items, i32, for each user of the part.
        """
        starts, streams = self._log.starts, self._streams[part]
        begin, end = starts[streams], starts[streams + 1]
        return self._known(np.maximum(begin, end - self._latest) if self._latest else begin, end)

    def seen(self, part: slice) -> list[np.ndarray]:
        """All items of users, also those that are not read.

        Args:
          part: of `users`.

        Returns:
          Indices of items, i32, for each user of the part.
        """
        bounds = self._log.starts[self._bounds[part.start : part.stop + 1]]
        return self._known(bounds[:-1], bounds[1:])

    def _report_read(self) -> None:
        """Logs how many events are read, if some are not."""
        sizes = np.diff(self._log.starts)[self._streams]
        count = int(np.minimum(sizes, self._latest).sum() if self._latest else sizes.sum())
        if count < len(self._log.items):
            latest = f", and of these the latest {self._latest:,}" if self._latest else ""
            text = "Read: %s of %s events: those of each user's latest session%s."
            logging.info(text, f"{count:,}", f"{len(self._log.items):,}", latest)

    def _known(self, begins: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
        rows = (self._index[self._log.items[a:b]] for a, b in zip(begins, ends, strict=True))
        return [items[items >= 0] for items in rows]


def _latest_streams(log: Events) -> np.ndarray:
    """The stream of each user that ends last, i64 [users]; the last one of those that tie."""
    ends = log.times[log.starts[1:] - 1]
    order = np.lexsort((ends, log.users))
    return order[np.searchsorted(log.users, np.unique(log.users), "right") - 1]


def _report_unknown(index: np.ndarray, ids: Sequence[Any], known: np.ndarray) -> None:
    """Counts the items that the model does not know; none may be left.

    Raises:
      ValueError: the model knows none of them.
    """
    unknown = int((index < 0).sum())
    if unknown == len(index):
        shown = f"{ids[0]!r}, and those of the model are like {known.tolist()[0]!r}"
        raise ValueError(
            f"the model knows none of the {len(ids):,} items: they are like {shown}. Name the "
            "column of items with --item, and bring ids to the same form"
        )
    if unknown:
        shown = ids[int(np.flatnonzero(index < 0)[0])]
        text = "%s of %s items are unknown to the model, such as %r: their events are left out."
        logging.warning(text, f"{unknown:,}", f"{len(index):,}", shown)
