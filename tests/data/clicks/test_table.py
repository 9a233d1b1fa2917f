"""A user's own table: an oracle of order, splits and targets; formats; ids, times, and bad rows."""

from __future__ import annotations

import codecs
import csv
import datetime
import logging
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

import rmjax
from rmjax.data.clicks import events as store
from rmjax.data.pipeline import batches
from rmjax.data.source import hash64

SPLITS = ("train", "valid", "test")
OPTIONS = dict(first=5, every=3, max_targets=3, max_items=12, segment_length=5)
NAMES = ("user_id", "item_id", "timestamp")


def log(users=40, items=30, seed=0):
    """Rows (user, item, time) in no order: ties, repeated items, duplicates, users of few events."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        count = int(rng.integers(1, 50))
        times = 1_700_000_000 + rng.integers(0, 60, count) * 1000 + user * 300
        rows += [(user + 7, int(rng.integers(items)) * 11, int(time)) for time in times]
    rows += rows[:9]
    return [rows[k] for k in rng.permutation(len(rows))]


ROWS = log()


def frame(rows, types=(int, int, int)):
    columns = zip(*rows, strict=True)
    return {
        name: [kind(value) for value in values]
        for name, values, kind in zip(NAMES, columns, types, strict=True)
    }


def write(path, rows, header=NAMES, separator=","):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=separator, lineterminator="\n").writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def opened(cache):
    def opened(events, **options):
        return rmjax.open_table(events, cache_dir=cache, **OPTIONS | options)

    return opened


def streams_of(rows, seed=0):
    """{user: [(time, item)]} in order, without duplicates; in plain Python."""
    key = lambda id_: id_ if isinstance(id_, int) else zlib.crc32(id_.encode())
    tie = lambda user, item: int(hash64("table tie", seed, key(user), key(item)))
    logs = {}
    for user, item, time in sorted({*rows}, key=lambda row: (row[2], tie(*row[:2]))):
        logs.setdefault(user, []).append((time, item))
    return dict(sorted(logs.items()))


def targets_of(logs, split, first=5, every=3, hold_out=1, **_):
    """{split: {(user, place)}} of the splits by time and by the last events."""
    regular = {(u, p): logs[u][p][0] for u in logs for p in range(first, len(logs[u]), every)}
    if split == "last":
        held = lambda u, low: range(max(first, len(logs[u]) - low), len(logs[u]) - low + hold_out)
        ends = {u: len(logs[u]) - 2 * hold_out for u in logs}
        valid = {(u, p) for u in logs for p in held(u, 2 * hold_out)}
        test = {(u, p) for u in logs for p in held(u, hold_out)}
        return {"train": {k for k in regular if k[1] < ends[k[0]]}, "valid": valid, "test": test}
    times = sorted(regular.values())
    test_start = times[int(0.8 * len(times))]
    times = [time for time in times if time < test_start]
    train_end = times[int(0.9 * len(times))]
    part = lambda time: SPLITS[(time >= train_end) + (time >= test_start)]
    return {name: {k for k, time in regular.items() if part(time) == name} for name in SPLITS}


def asked_of(source, split):
    """Yields (example, place of the question, stream before it, targets' item) of a split."""
    examples = source.fetch(split, np.arange(source.size(split)))
    for row in range(source.size(split)):
        mask = examples["query_mask"][row]
        items = examples["items"][row]
        assert not items[examples["length"][row] :].any()
        for column in np.flatnonzero(mask):
            position = examples["position"][row, column]
            assert position <= examples["length"][row]
            yield row, items[:position].tolist(), int(examples["target"][row, column])


@pytest.mark.parametrize("options", [{}, dict(split="last", hold_out=2), dict(max_items=0)])
def test_questions_are_those_of_a_plain_program(opened, options):
    source, logs = opened(frame(ROWS), **options), streams_of(ROWS)
    wanted = targets_of(logs, **dict(split="time") | options)
    numbers = {item: k for k, item in enumerate(sorted({row[1] for row in ROWS}))}
    assert source.numbering.tolist() == list(numbers) and source.numbering.dtype == np.int64
    users = list(logs)
    for split in SPLITS:
        places = {}
        for row, before, target in asked_of(source, split):
            user = users[source.stream_id(split)[row]]
            line = [numbers[item] for _, item in logs[user]]
            asked = source.asked[split]
            rows = asked.rows[asked.bounds[row] : asked.bounds[row + 1]]
            place = int(rows[len(places.get(row, []))] - source.events.starts[users.index(user)])
            places.setdefault(row, []).append((user, place))
            assert line[place] == target
            # The stream is a piece of the user's, up to the question; with a segment to see.
            assert before == line[place - len(before) : place] and len(before) >= 5
            assert len(before) <= (options.get("max_items", 12) or 99)
        every = [pair for pairs in places.values() for pair in pairs]
        assert {*every} == wanted[split] and len(every) == len(wanted[split])
        per_example = 1 if options.get("split") == "last" and split != "train" else 3
        assert max(map(len, places.values())) <= per_example
    counted = np.zeros(len(numbers), int)
    cut = min(logs[u][p][0] for u, p in wanted["valid"])
    for line in logs.values():
        end = len(line) - 4 if options.get("split") == "last" else None
        for time, item in line[: max(end, 0)] if end is not None else line:
            counted[numbers[item]] += end is not None or time < cut
    assert source.popularity.tolist() == counted.tolist()


def test_questions_see_as_many_whole_segments_as_their_streams_allow(opened):
    """Dropping the oldest items takes no segment from any question, and aligns the last ones."""
    source = opened(frame(ROWS), split="last", max_items=0)
    starts, asked = source.events.starts, source.asked["test"]
    examples = source.fetch("test", np.arange(source.size("test")))
    place = asked.rows - starts[asked.streams]
    np.testing.assert_array_equal(examples["position"][:, 0], place // 5 * 5)
    for every in (1, 2, 5):
        asked = opened(frame(ROWS), max_items=0, every=every).asked["train"]
        stream = np.repeat(asked.streams, np.diff(asked.bounds))
        window = np.repeat(asked.starts, np.diff(asked.bounds))
        assert ((asked.rows - window) // 5 == (asked.rows - starts[stream]) // 5).all()


def test_users_are_held_out_as_a_part(opened):
    source = opened(frame(ROWS), split="user")
    users = {split: {*source.events.users[source.stream_id(split)]} for split in SPLITS}
    assert not users["train"] & users["test"] and not users["valid"] & users["test"]
    asked = sum(len(line) > 5 for line in streams_of(ROWS).values())
    assert len(users["test"]) == round(0.2 * asked) and sum(map(len, users.values())) == asked
    held = {*users["test"], *users["valid"]}
    lines = enumerate(streams_of(ROWS).values())
    assert source.popularity.sum() == sum(len(line) for k, line in lines if k not in held)
    assert users != {s: {*opened(frame(ROWS), split="user", seed=1).stream_id(s)} for s in SPLITS}


def same(first, second):
    assert first.numbering.tolist() == second.numbering.tolist()
    for split in SPLITS:
        one, other = (s.fetch(split, np.arange(s.size(split))) for s in (first, second))
        for name, values in one.items():
            np.testing.assert_array_equal(other[name], values, err_msg=f"{split} {name}")


def test_every_format_gives_the_same_examples(opened, tmp_path):
    want, table = opened(frame(ROWS)), pa.table(frame(ROWS))
    pa.parquet.write_table(table, tmp_path / "e.parquet", row_group_size=100)
    pa.feather.write_feather(table.append_column("x", table["item_id"]), tmp_path / "e.feather")
    with pa.ipc.new_file(tmp_path / "e.arrow", table.schema) as file:
        for start in range(0, len(ROWS), 50):
            file.write_table(table.slice(start, 50))
    write(tmp_path / "e.csv", [(i, "a, b", u, t) for u, i, t in ROWS],
        ("item_id", "name", "user_id", "timestamp"))  # fmt: skip
    write(tmp_path / "e.tsv", ROWS, separator="\t")
    typed = ("user_id:token", "item_id:token", "timestamp:float")
    write(tmp_path / "e.inter", ROWS, typed, "\t")
    for name in ("parquet", "feather", "arrow", "csv", "tsv", "inter"):
        same(want, opened(tmp_path / f"e.{name}"))
    folder = tmp_path / "parts"
    folder.mkdir()
    for start in range(0, len(ROWS), 300):
        write(folder / f"{start:04}.csv", ROWS[start : start + 300])
    (folder / "._0000.csv").write_text("of macOS")
    same(want, opened(str(folder)))
    same(want, opened(table))
    arrays = {name: np.array(values) for name, values in frame(ROWS).items()}
    same(want, opened(arrays | {"user_id": pa.array(arrays["user_id"]).dictionary_encode()}))
    same(want, opened({"u": arrays["user_id"], "v": arrays["item_id"], "t": arrays["timestamp"]},
        user="u", item="v", time="t"))  # fmt: skip
    taken = lambda source: next(iter(batches(
        source, seed=0, batch_size=4, segment_length=5, num_steps=1)))  # fmt: skip
    first, second = taken(opened(tmp_path / "e.csv")), taken(opened(tmp_path / "e.inter"))
    np.testing.assert_array_equal(first.items, second.items)


def test_the_order_of_rows_and_byte_order_marks_do_not_matter(opened, tmp_path, caplog):
    want = opened(frame(ROWS))
    same(want, opened(frame(sorted(ROWS))))
    same(want, opened(frame(ROWS[::-1])))
    body = write(tmp_path / "a.csv", ROWS).read_bytes()
    variants = [codecs.BOM_UTF8 + body, body.replace(b"\n", b"\r\n"), body + b"\n\r\n"]
    for number, data in enumerate([*variants, body.decode().encode("utf-16")]):
        (tmp_path / f"{number}.csv").write_bytes(data)
        same(want, opened(tmp_path / f"{number}.csv"))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    (tmp_path / "cut.csv").write_bytes(body[:-1])
    opened(tmp_path / "cut.csv")
    assert "the last row has no end" in caplog.text


def test_large_tables_are_sorted_and_searched_in_blocks(opened, monkeypatch, tmp_path):
    want, pairs = opened(frame(ROWS)), opened(frame(ROWS), ask="pairs")
    monkeypatch.setattr(store, "SORTED", 64)
    monkeypatch.setattr("rmjax.data.clicks.columns.ROWS", 100)
    monkeypatch.setattr("rmjax.data.clicks.table._BLOCK", 64)
    blocks = lambda **options: opened(frame(ROWS), cache_dir=str(tmp_path), **options)
    same(want, blocks())
    same(pairs, blocks(ask="pairs"))


def test_equal_times_are_in_no_order_of_ids(opened):
    rows = [(user, item, user // 4) for user in range(40) for item in range(30)]
    streams = [opened(frame(rows), seed=seed).events.items.reshape(40, 30) for seed in (0, 1)]
    assert (np.diff(streams[0]) > 0).mean() == pytest.approx(0.5, abs=0.1)
    assert (streams[0] != streams[1]).mean() > 0.8
    assert (streams[0][1:] != streams[0][:-1]).mean() > 0.8


UTC = datetime.UTC
TIMES = {
    "milliseconds": lambda t: t * 1000,
    "floats": lambda t: t / 7,
    "numbers as text": lambda t: f" {t}.0",
    "naive text": lambda t: str(datetime.datetime.fromtimestamp(t, UTC).replace(tzinfo=None)),
    "text with T": lambda t: datetime.datetime.fromtimestamp(t, UTC).isoformat(),
    "text with Z": lambda t: f"{datetime.datetime.fromtimestamp(t, UTC):%Y-%m-%d %H:%M:%S}Z",
    "zones": lambda t: datetime.datetime.fromtimestamp(
        t, datetime.timezone(datetime.timedelta(hours=t // 1000 % 20 - 9, minutes=30))
    ).isoformat(),
    "mixed with naive": lambda t: datetime.datetime.fromtimestamp(
        t, [UTC, datetime.timezone(datetime.timedelta(hours=2))][t % 1001 // 501]
    ).isoformat().removesuffix("+00:00"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TIMES)
def test_times_of_any_form_give_the_same_order(opened, tmp_path, kind):
    want = opened(frame(ROWS))
    events = frame([(u, i, TIMES[kind](t)) for u, i, t in ROWS], (int, int, lambda x: x))
    same(want, opened(events))
    if isinstance(events["timestamp"][0], str):
        same(want, opened(write(tmp_path / "a.csv", zip(*events.values(), strict=True))))


def test_timestamps_of_arrow_and_integers_of_any_size(opened):
    want, seconds = opened(frame(ROWS)), frame(ROWS)["timestamp"]
    for kind in (pa.timestamp("s"), pa.timestamp("us", "Europe/Paris"), pa.date64()):
        values = pa.array([s * 1000 if kind == pa.timestamp("ms") else s for s in seconds])
        if pa.types.is_date(kind):
            values = pa.array([s // 1000 * 86_400_000 for s in seconds])
            days = opened(frame(ROWS) | {"timestamp": [s // 1000 for s in seconds]})
            same(days, opened(frame(ROWS) | {"timestamp": values.cast(kind)}))
        else:
            stamps = values.cast(pa.timestamp("s")).cast(kind)
            same(want, opened(frame(ROWS) | {"timestamp": stamps}))
    nanoseconds = [s * 10**9 + 1 for s in seconds]
    same(want, opened(frame(ROWS) | {"timestamp": nanoseconds}))
    small = {"timestamp": pa.array([s - 1_700_000_000 for s in seconds], pa.int32())}
    same(
        want,
        opened(frame(ROWS) | small | {"user_id": pa.array(frame(ROWS)["user_id"], pa.uint8())}),
    )


def test_ids_of_text_files_are_integers_if_all_are_written_so(opened, tmp_path):
    """One leading zero, plus sign, word or number beyond 64 bits makes all of them strings."""
    rows = lambda id_: [(u, id_ if i == 0 else i, t) for u, i, t in ROWS]
    assert opened(write(tmp_path / "0.csv", rows(-5))).numbering.min() == -5
    for number, odd in enumerate(["007", "+7", "x-7", "7.0", "9" * 19, "ü"], 1):
        source = opened(write(tmp_path / f"{number}.csv", rows(odd)))
        texts = sorted({str(row[1]) for row in rows(odd)})
        assert source.numbering.tolist() == texts and source.numbering.dtype == object
    words = opened(frame(ROWS, (str, str, int)))
    assert words.numbering.tolist() == sorted({str(row[1]) for row in ROWS})
    texts = [(str(u), str(i), t) for u, i, t in ROWS]
    lines = streams_of(texts)
    assert [words.numbering[k] for k in words.events.items] == [
        item for line in lines.values() for _, item in line
    ]


def test_kinds_of_events_are_chosen(opened, tmp_path):
    rows = [(*row, "buy" if row[1] % 2 else "view") for row in ROWS]
    kept = [row[:3] for row in rows if row[3] == "buy"]
    path = write(tmp_path / "a.csv", [*rows, ("", "", "never", "view")], (*NAMES, "what"))
    source = opened(path, event="what", events="buy")
    same(source, opened(frame(kept)))
    assert source.events.counts["other events"] == len(rows) - len(kept) + 1
    same(opened(path, event="what", events="buy,view", bad_rows="skip"), opened(frame(ROWS)))
    with pytest.raises(ValueError, match=r"column what is 'biy': did you mean 'buy'\?"):
        opened(path, event="what", events="biy")
    for options in (dict(event="what"), dict(events="buy")):
        with pytest.raises(ValueError, match="set both"):
            opened(path, **options)


def test_a_session_is_a_stream(opened):
    rows = log(users=10, seed=2)
    sessions = [time // 20_000 for _, _, time in rows]
    source = opened(frame(rows) | {"visit": sessions}, session="visit", max_items=0)
    joined = [((u, s), i, t) for (u, i, t), s in zip(rows, sessions, strict=True)]
    lines = {}
    for user, line in streams_of(rows).items():
        for time, item in line:
            lines.setdefault((user, time // 20_000), []).append(item)
    assert len({user for user, *_ in joined}) == len(lines) == len(source.events.starts) - 1
    got = np.split(source.numbering[source.events.items], source.events.starts[1:-1])
    assert [line.tolist() for line in got] == [lines[key] for key in sorted(lines)]
