"""Writes a large made-up log of events as Parquet, a million events at a time.

    pip install -e '.[tables]'
    python examples/big_log.py --out big.parquet

The columns are user_id and item_id (strings), and timestamp (seconds since 1970, ascending). Items
are drawn by popularity, which falls as 1 / (20 + rank), and users uniformly. So nothing can be
learned from the log: it is for measurements of time and memory. Each command below prints its
seconds, and /usr/bin/time -v prints the largest memory ("Maximum resident set size").

    # preparation; the first training step and its compilation. Then Ctrl-C saves and ends the run
    /usr/bin/time -v python -m rmjax.main --config=configs/clicks.py:local --workdir=runs/big \
        --config.data.table.path=big.parquet

    # recommendations for all users, from the checkpoint of the run above
    /usr/bin/time -v python -m rmjax.recommend --workdir=runs/big --events=big.parquet \
        --out=recs.parquet --latest=200
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PART = 1_000_000  # events in memory at once
START = 1_704_067_200  # 2024-01-01, of the first event
YEAR = 365 * 86_400  # seconds that the log spans


def write(path: Path, events: int, users: int, items: int, seed: int) -> None:
    """Writes the log.

    Args:
      path: the Parquet file.
      events: number of events.
      users: number of users.
      items: number of items.
      seed: seed of all draws.
    """
    rng = np.random.default_rng(seed)
    share = np.cumsum(1 / (20 + np.arange(items)))
    by_rank = rng.permutation(items)
    names = {
        "user_id": pa.array([f"u{k:08d}" for k in range(users)]),
        "item_id": pa.array([f"SKU-{k:08d}" for k in range(items)]),
    }
    schema = pa.schema({name: pa.string() for name in names} | {"timestamp": pa.int64()})
    with pq.ParquetWriter(path, schema) as file:
        for first in range(0, events, PART):
            place = np.arange(first, min(first + PART, events))
            rank = np.searchsorted(share, rng.uniform(0, share[-1], len(place)), "right")
            drawn = {
                "user_id": rng.integers(0, users, len(place)),
                "item_id": by_rank[np.minimum(rank, items - 1)],
            }
            columns = {name: names[name].take(pa.array(drawn[name])) for name in names}
            columns["timestamp"] = pa.array(START + place * YEAR // events)
            file.write_table(pa.table(columns, schema))


def main() -> None:
    """Reads the sizes from the command line and writes the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("big.parquet"), help="the Parquet file")
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    write(asked.out, asked.events, asked.users, asked.items, asked.seed)
    print(f"{asked.out}: {asked.events:,} events, {asked.out.stat().st_size / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
