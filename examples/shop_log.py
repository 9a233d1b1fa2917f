"""Writes a made-up log of a shop as CSV: who saw or bought what, and when.

    python examples/shop_log.py --out shop.csv

The columns are user_id, sku, time (ISO 8601) and event (view, cart, wish or buy). The next item
is one of a few neighbours of the last one with probability `--markov`; otherwise it is drawn by
popularity, which falls as 1 / (20 + rank). So the best rule knows the last item, and popularity
knows little. The same seed writes the same file.
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
    """

    users: int = 2000
    items: int = 3000
    neighbours: int = 5
    markov: float = 0.6
    shortest: int = 10
    longest: int = 120
    seed: int = 0


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


def write(shop: Shop, path: Path) -> int:
    """Writes the log in the order of time.

    Args:
      shop: the sizes.
      path: the CSV file.

    Returns:
      The number of events.
    """
    user, item, seconds, event = draw(shop)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["user_id", "sku", "time", "event"])
        for n in np.argsort(seconds, kind="stable"):
            time = datetime.datetime.fromtimestamp(int(seconds[n]), datetime.UTC)
            iso = time.strftime("%Y-%m-%dT%H:%M:%SZ")
            rows.writerow([f"u{user[n]:05d}", f"SKU-{item[n]:05d}", iso, EVENTS[event[n]]])
    return len(user)


def main() -> None:
    """Reads the sizes from the command line and writes the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("shop.csv"), help="the CSV file")
    for name, default in Shop()._asdict().items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    values = vars(parser.parse_args())
    path = values.pop("out")
    print(f"{path}: {write(Shop(**values), path):,} events")


if __name__ == "__main__":
    main()
