"""The made-up logs of the examples are what their pages say."""

from __future__ import annotations

import csv

import numpy as np
import pyarrow.parquet as pq
import pytest

import rmjax
from tests.shop import Shop, big_log, shop_log


def rows(path):
    with path.open() as file:
        return [tuple(row.values()) for row in csv.DictReader(file)]


def test_new_items_occur_in_the_last_week_alone_and_the_log_before_it_is_its_start(tmp_path):
    shop = Shop(users=80, items=40, week=0.3, new_items=0.1)
    path, before = tmp_path / "shop.csv", tmp_path / "before.csv"
    count = shop_log.write(shop, path, before)
    every, first = rows(path), rows(before)
    assert len(every) == count and 0 < len(first) < count and every[: len(first)] == first
    shop_log.write(shop._replace(week=0.0, new_items=0.0), before)
    known = {item for _, item, _, _ in first}
    left_out = [row for row in rows(before) if row not in {*every}]
    new = {item for _, item, _, _ in every} - known
    assert len(new) == 4 and {item for _, item, _, _ in left_out} == new


def test_new_items_without_a_last_week_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--new_items=0.1 needs --week"):
        shop_log.write(Shop(users=5, items=9, new_items=0.1), tmp_path / "shop.csv")


def test_a_large_log_opens_as_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(big_log, "PART", 300)
    big_log.write(tmp_path / "big.parquet", events=1000, users=20, items=30, seed=1)
    source = rmjax.open_table(str(tmp_path / "big.parquet"), cache_dir=str(tmp_path))
    events = source.events
    assert len(events.items) == 1000 and len(events.user_keys) == 20 and source.num_items == 30
    times = pq.read_table(tmp_path / "big.parquet")["timestamp"].to_numpy()
    assert (np.diff(times) > 0).all()
