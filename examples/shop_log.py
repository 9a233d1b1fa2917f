"""Writes a made-up log of a shop as CSV: who saw or bought what, and when.

    python examples/shop_log.py --out shop.csv

The columns are user_id, sku, time (ISO 8601) and event (view, cart, wish or buy). The next item
is one of a few neighbours of the last one with probability `--markov`. Otherwise it is drawn by
popularity, which falls as 1 / (20 + rank). So the best rule knows the last item, and popularity
knows little. The same seed writes the same file.

    python examples/shop_log.py --out shop.csv --before before.csv --week 0.15 --new_items 0.05

The last `--week` of the events may have new items: `--new_items` is their share of all items. The
events before that week are also written to `--before`. So a second run can go on from a first one
with `config.train.start_from`.
"""

from __future__ import annotations

import argparse
import csv
import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

EVENTS = ("view", "cart", "wish", "buy")
EVENT_SHARES = (0.8, 0.1, 0.05, 0.05)


class Shop(NamedTuple):
    """Sizes of the made-up shop.

    Attributes:
      users: number of users.
      items: number of items.
      neighbours: number of items that follow an item.
      markov: probability that the next item is one of them.
      shortest: events of the shortest history.
      longest: events of the longest history.
      seed: seed of all draws.
      week: share of the events that form the last week.
      new_items: share of the items that occur in the last week only; their earlier events are left
        out.
    """

    users: int = 2000
    items: int = 3000
    neighbours: int = 5
    markov: float = 0.6
    shortest: int = 10
    longest: int = 120
    seed: int = 0
    week: float = 0.0
    new_items: float = 0.0


def draw(shop: Shop) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draws the log, sorted by user and time.

    Args:
      shop: the sizes.

    Returns:
      user i64 [n], item i64 [n], seconds since 1970 i64 [n], event i64 [n] (index in `EVENTS`).
    """
    rng = np.random.default_rng(shop.seed)
    share = 1 / (20 + np.arange(shop.items))
    popular = rng.permutation(shop.items)  # item of each rank of popularity
    by_rank = np.cumsum(share / share.sum())
    any_item = lambda size: popular[
        np.minimum(np.searchsorted(by_rank, rng.random(size)), shop.items - 1)
    ]
    neighbour = any_item((shop.items, shop.neighbours))
    # Half of the neighbours are drawn by popularity, half uniformly: rare items are reached too.
    uniform = rng.integers(0, shop.items, neighbour.shape)
    neighbour = np.where(rng.random(neighbour.shape) < 0.5, neighbour, uniform)
    spread = np.log([shop.shortest, shop.longest + 1])
    length = np.exp(rng.uniform(*spread, shop.users)).astype(np.int64)
    item = np.empty((shop.users, length.max()), np.int64)
    item[:, 0] = any_item(shop.users)
    for place in range(1, item.shape[1]):
        near = neighbour[item[:, place - 1], rng.integers(0, shop.neighbours, shop.users)]
        follows = rng.random(shop.users) < shop.markov
        item[:, place] = np.where(follows, near, any_item(shop.users))
    exists = np.arange(item.shape[1]) < length[:, None]
    wait = rng.exponential(6 * 3600.0, item.shape) + 1
    start = rng.uniform(0, 90 * 86400.0, (shop.users, 1))
    first = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC).timestamp()
    seconds = (first + start + np.cumsum(wait, 1)).astype(np.int64)
    user = np.broadcast_to(np.arange(shop.users)[:, None], item.shape)
    event = rng.choice(len(EVENTS), item.shape, p=EVENT_SHARES)
    return user[exists], item[exists], seconds[exists], event[exists]


def write(shop: Shop, path: Path, before: Path | None = None) -> int:
    """Writes the log in the order of time.

    Args:
      shop: the sizes.
      path: the CSV file.
      before: the CSV file of the events before the last week; None: no such file.

    Returns:
      The number of events.

    Raises:
      ValueError: there are new items, but no last week for them.
    """
    if shop.new_items and not shop.week:
        raise ValueError(
            f"--new_items={shop.new_items:g} needs --week, since new items occur in the last week"
        )
    user, item, seconds, event = draw(shop)
    order = np.argsort(seconds, kind="stable")
    last = order[round(len(order) * (1 - shop.week)) :]
    known = np.ones(len(order), bool)
    known[last] = False
    rng = np.random.default_rng([shop.seed, 1])
    new = rng.permutation(shop.items)[: round(shop.new_items * shop.items)]
    chosen = order[~(known & np.isin(item, new))[order]]
    for target, rows in ((path, chosen), (before, chosen[known[chosen]])):
        if target is not None:
            with target.open("w", newline="") as file:
                lines = csv.writer(file)
                lines.writerow(["user_id", "sku", "time", "event"])
                for n in rows:
                    time = datetime.datetime.fromtimestamp(int(seconds[n]), datetime.UTC)
                    iso = time.strftime("%Y-%m-%dT%H:%M:%SZ")
                    lines.writerow([f"u{user[n]:05d}", f"SKU-{item[n]:05d}", iso, EVENTS[event[n]]])
    return len(chosen)


def main() -> None:
    """Reads the sizes from the command line and writes the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("shop.csv"), help="the CSV file")
    for name, default in Shop()._asdict().items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    help_text = "also writes the events before the last week to this CSV file"
    parser.add_argument("--before", type=Path, help=help_text)
    values = vars(parser.parse_args())
    path, before = values.pop("out"), values.pop("before")
    try:
        print(f"{path}: {write(Shop(**values), path, before):,} events")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
