"""A user's own table: an oracle of order, splits and targets; formats; ids, times, and bad rows."""

from __future__ import annotations

import codecs
import csv
import datetime
import json
import logging
import pickle
import sys
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

import rmjax
from rmjax.config import base
from rmjax.data import make_source
from rmjax.data.pipeline import batches
from rmjax.data.source import hash64
from rmjax.data.tables import events as store
from rmjax.run import training
from tests.runs import PLAIN, tiny

SPLITS = ("train", "valid", "test")
OPTIONS = dict(first=5, every=3, max_targets=3, max_items=12, segment_length=5)
NAMES = ("user_id", "item_id", "timestamp")


def log(users=40, items=30, seed=0):
    """Rows (user, item, time) unsorted: ties, repeated items, duplicates, users of few events."""
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
    def opened(table, **options):
        return rmjax.open_table(table, **dict(cache_dir=cache) | OPTIONS | options)

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


@pytest.mark.parametrize(
    "options", [{}, dict(split="last", hold_out=2), dict(max_items=0), dict(max_items=10)]
)
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
        per_example = 2 if options.get("max_items") == 10 else 3
        per_example = 1 if options.get("split") == "last" and split != "train" else per_example
        most = max(map(len, places.values()))
        assert most == per_example if split == "train" else most <= per_example
        longest = max(len(before) for _, before, _ in asked_of(source, split))
        assert longest == 10 or options.get("max_items") != 10
    counted = np.zeros(len(numbers), int)
    cut = min(logs[u][p][0] for u, p in wanted["valid"])
    for line in logs.values():
        end = len(line) - 4 if options.get("split") == "last" else None
        for time, item in line[: max(end, 0)] if end is not None else line:
            counted[numbers[item]] += end is not None or time < cut
    assert source.popularity.tolist() == counted.tolist()


def test_pairs_see_as_many_whole_segments_as_their_streams_allow(opened):
    """Dropping the oldest items takes no segment from any question, and aligns the last ones."""
    source = opened(frame(ROWS), split="last", max_items=0, ask="pairs")
    starts, asked = source.events.starts, source.asked["test"]
    examples = source.fetch("test", np.arange(source.size("test")))
    place = asked.rows - starts[asked.streams]
    np.testing.assert_array_equal(examples["position"][:, 0], place // 5 * 5)
    for every in (1, 2, 5):
        asked = opened(frame(ROWS), max_items=0, every=every, ask="pairs").asked["train"]
        stream = np.repeat(asked.streams, np.diff(asked.bounds))
        window = np.repeat(asked.starts, np.diff(asked.bounds))
        assert ((asked.rows - window) // 5 == (asked.rows - starts[stream]) // 5).all()


def test_the_next_item_is_asked_after_all_items_before_it(opened):
    """29 events: the last target has 28 items before it, of which the latest 12 may be asked."""
    rows = [(user, user * 29 + k, k) for user in range(4) for k in range(29)]
    for max_items, seen in ((0, 28), (12, 12)):
        source = opened(frame(rows), split="last", max_items=max_items)
        examples = source.fetch("test", np.arange(source.size("test")))
        assert examples["length"].tolist() == [seen] * 4 == examples["position"][:, 0].tolist()


def test_the_first_question_may_come_before_a_whole_segment(opened):
    source = opened(frame(ROWS), first=2)
    examples = source.fetch("train", np.arange(source.size("train")))
    assert examples["position"][examples["query_mask"]].min() == 2
    taken = batches(source, seed=0, batch_size=4, segment_length=5, num_steps=1)
    batch = next(iter(taken))
    full = np.asarray(batch.items_before) // 5
    np.testing.assert_array_equal(np.where(batch.query_mask, batch.position, full), full)


def test_baselines_leave_out_the_items_that_the_model_leaves_out(opened):
    """Only items of the cut stream do not compete, though users have up to 49 of them."""
    source = opened(frame(ROWS), exclude_seen=True, max_items=5)
    ranks = source.references("test")
    examples = source.fetch("test", np.arange(source.size("test")))
    cut = 0
    for row, column in np.argwhere(examples["query_mask"]):
        target = examples["target"][row, column]
        before = examples["items"][row, : examples["position"][row, column]]
        count = source.popularity
        competes = np.ones(source.num_items, bool)
        competes[before] = False
        competes[target] = True
        better = (competes & (count > count[target])).sum()
        equal = (competes & (count == count[target])).sum() - 1
        assert ranks["popularity"][row, column] == 1 + better + equal / 2
        asked = source.asked["test"]
        cut += asked.starts[row] > source.events.starts[asked.streams[row]]
    assert cut


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
    (folder / "_SUCCESS").write_text("of Spark")
    same(want, opened(str(folder)))
    for start, name in ((0, "day=1"), (300, "day=2")):  # a table in parts by columns
        (folder / name / "of").mkdir(parents=True)
        (folder / f"{start:04}.csv").rename(folder / name / "of" / "part.csv")
    (folder / "_temporary").mkdir()
    (folder / "_temporary" / "part.csv").write_text("not yet written")
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
    monkeypatch.setattr("rmjax.data.tables.files.ROWS", 100)
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
    for kind in (pa.timestamp("s"), pa.timestamp("ns"), pa.timestamp("us", "Europe/Paris")):
        stamps = pa.array(seconds).cast(pa.timestamp("s")).cast(kind)
        same(want, opened(frame(ROWS) | {"timestamp": stamps}))
    days = [s // 10_000 for s in seconds]  # also of the years after 2262
    for kind, one in ((pa.date32(), 1), (pa.date64(), 86_400_000)):
        dates = pa.array([day * one for day in days], pa.int64() if one > 1 else pa.int32())
        got = opened(frame(ROWS) | {"timestamp": dates.cast(kind)})
        same(opened(frame(ROWS) | {"timestamp": days}), got)
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


@pytest.mark.parametrize("negatives", ["popularity", "uniform"])
def test_negatives_are_never_the_users_and_alike(opened, negatives):
    options = dict(ask="pairs", negatives=negatives)
    popular = np.random.default_rng(0).random(6000) ** 3 * 900
    rows = [(k % 60, int(item), k) for k, item in enumerate(popular)]
    source = opened(frame(rows), **options)
    owned = {user: {item for _, item in line} for user, line in streams_of(rows).items()}
    counts = []
    for split in SPLITS:
        examples = source.fetch(split, np.arange(source.size(split)))
        mask, query = examples["query_mask"], source.numbering[examples["query"]]
        asked = source.asked[split]
        user = source.events.users[asked.streams]
        assert (mask.sum(1) == 2 * np.diff(asked.bounds)).all()
        assert (examples["target"] == np.where(mask, np.arange(mask.shape[1]) % 2 == 0, 0)).all()
        for row, columns in zip(range(len(mask)), mask, strict=True):
            positive, negative = query[row, columns].reshape(-1, 2).T
            assert not owned[user[row]] & {*negative.tolist()}
            assert {*positive.tolist()} <= owned[user[row]]
        pair = examples["query"][mask].reshape(-1, 2)
        count = source.popularity[pair]
        counts.append(np.log1p(count))
        if negatives == "popularity":
            assert ((count[:, 0] == 0) == (count[:, 1] == 0)).mean() > 0.95
    alike = np.corrcoef(np.concatenate(counts).T)[0, 1]
    assert alike > 0.8 if negatives == "popularity" else abs(alike) < 0.2
    same(source, opened(frame(rows), **options))
    other = opened(frame(rows), **options, seed=1)
    assert (other.asked["train"].negatives != source.asked["train"].negatives).mean() > 0.5


def test_negatives_of_users_who_have_nearly_everything(opened):
    rows = [(user, item, item) for user in range(8) for item in range(300) if item != user]
    for negatives in ("popularity", "uniform"):
        source = opened(frame(rows), ask="pairs", negatives=negatives)
        for asked in source.asked.values():
            user = np.repeat(source.events.users[asked.streams], np.diff(asked.bounds))
            assert (source.numbering[asked.negatives] == user).all()
    full = [(9, item, item) for item in range(300)]
    with pytest.raises(ValueError, match=r"a user has every item.*ask=next"):
        opened(frame(rows + full), ask="pairs")


def test_references_know_the_stream_before_the_question(opened):
    source = opened(frame(ROWS))
    ranks = source.references("test")
    assert ranks.keys() >= {"popularity", "co-occurrence", "nearest id", "most recent"}
    pairs = opened(frame(ROWS), ask="pairs").references("test")
    assert pairs.keys() == {"popularity", "nearest id"}
    examples = source.fetch("test", np.arange(source.size("test")))
    for row, column in np.argwhere(examples["query_mask"]):
        target = examples["target"][row, column]
        last = examples["items"][row, examples["position"][row, column] - 1]
        count, distance = source.popularity, np.abs(np.arange(source.num_items) - last)
        for name, score in (("popularity", count), ("nearest id", -distance)):
            better = (score > score[target]).sum() + ((score == score[target]).sum() - 1) / 2
            assert ranks[name][row, column] == 1 + better
            assert pairs[name][row, 2 * column] == score[target]


def test_a_row_without_a_kind_of_event_is_a_bad_row(opened, tmp_path):
    rows = [(*row, "buy") for row in ROWS]
    rows[4:4] = [(7, 11, 3, ""), (7, 11, 4, "view")]
    options = dict(event="what", events="buy")
    path, table = write(tmp_path / "a.csv", rows, (*NAMES, "what")), frame(r[:3] for r in rows)
    for events in (path, table | {"what": [row[3] or None for row in rows]}):
        says = "row 5, column what: expected a kind of event, found None: mend it, or set config"
        with pytest.raises(ValueError, match=says):
            opened(events, **options)
        source = opened(events, bad_rows="skip", **options)
        same(source, opened(frame(ROWS)))
        counts = source.events.counts
        assert counts["no kind of event"] == counts["other events"] == 1


def test_ids_of_two_types_are_named_and_parts_without_ids_have_none(opened, tmp_path):
    words = frame(ROWS, (int, str, int))
    for number, items in enumerate([[None] * len(ROWS), words["item_id"], frame(ROWS)["item_id"]]):
        table = pa.table(words | {"item_id": items})
        pa.parquet.write_table(table, tmp_path / f"{number}.parquet")
    cause = "2.parquet, column item_id: ids are int64, but large_string in earlier rows: cast them"
    with pytest.raises(ValueError, match=cause):
        opened(tmp_path, bad_rows="skip")
    (tmp_path / "2.parquet").unlink()
    same(opened(words), opened(tmp_path, bad_rows="skip"))


def test_what_is_left_out_is_counted(opened, caplog):
    rows = [*ROWS, *ROWS[:4]]
    few = sum(len(line) <= 5 for line in streams_of(ROWS).values())
    assert few > 0
    for _ in range(2):  # prepared or not
        caplog.clear()
        with caplog.at_level(logging.INFO, "absl"):
            opened(frame(rows))
        repeats = len(rows) - len({*rows})
        assert f"of {len(rows):,} rows; left out: {repeats} duplicates" in caplog.text
        assert f"{40 - few} of 40 users are asked" in caplog.text
        assert f"{few} users have fewer than 6 events, so none of theirs is asked" in caplog.text
    assert "Preparing" not in caplog.text


def test_the_log_has_the_sizes_of_splits_and_warns_of_a_large_one(opened, caplog):
    at = lambda user, place: user + 100 * place if place < 11 else 9999  # 3 of 5 targets: test
    rows = [(user, place, at(user, place)) for user in range(20) for place in range(20)]
    for table, warns in ((ROWS, False), (rows, True)):
        caplog.clear()
        with caplog.at_level(logging.INFO, "absl"):
            sizes = {s: len(rows.rows) for s, rows in opened(frame(table)).asked.items()}
        total = sum(sizes.values())
        shown = [f"{s} {n:,} targets ({100 * n / total:.3g}%)" for s, n in sizes.items()]
        assert f"Table: {', '.join(shown)}." in caplog.text
        wanted = "Table: test takes 60%, not 20% (config.data.table.valid_fraction, test_fraction)"
        assert (wanted in caplog.text) == warns and ("takes" in caplog.text) == warns


BAD = [  # (rows that are wrong, by line of the file; the error's end)
    (["7,,1700000000"], "row 3, column item_id: expected an id, found None: mend it, or set "),
    ([",3,1700000000"], "row 3, column user_id: expected an id, found None"),
    (["7,3,"], "row 3, column timestamp: expected a time, found None"),
    (["7,3,soon"], "row 3, column timestamp: expected a number, as in earlier rows, found 'soon'"),
    (["7,3,2024-01-01"], "row 3, column timestamp: expected a number, as in earlier rows"),
    (["7,3,1e999"], "row 3, column timestamp: expected a number"),
    (["7,3"], "row 3, column (all): expected as many fields as the header has, found '7,3'"),
    (["7,3,4,5", "8"], "row 3, column (all): expected as many fields"),
]


@pytest.mark.parametrize("bad, says", BAD)
def test_a_bad_row_is_named_or_skipped(opened, tmp_path, bad, says):
    path = write(tmp_path / "a.csv", ROWS)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], *bad, *lines[3:], ""]))
    with pytest.raises(ValueError) as error:
        opened(path, cache_dir=str(tmp_path / "cache"))
    assert str(error.value).startswith(f"{path}, {says}") and "\n" not in str(error.value)
    assert str(error.value).endswith("mend it, or set config.data.table.bad_rows=skip")
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    source = opened(path, bad_rows="skip")
    same(source, opened(frame(ROWS)))
    counts = dict(source.events.counts)
    assert counts.pop("rows") == len(ROWS) + len(bad)
    assert counts.pop("duplicates") == len(ROWS) - len({*ROWS}) and [*counts.values()] == [len(bad)]


def test_dates_that_do_not_exist_are_found_among_many(opened, tmp_path):
    rows = [(u, i, TIMES["naive text"](t)) for u, i, t in ROWS]
    for place, wrong in ((50, "2023-02-29"), (70, "2024-04-31 10:00"), (90, "2024-13-01")):
        rows.insert(place, (7, 3, wrong))
    path = write(tmp_path / "a.csv", rows)
    with pytest.raises(ValueError, match="row 51, column timestamp: expected an ISO time such as"):
        opened(path)
    source = opened(path, bad_rows="skip")
    same(source, opened(frame(ROWS)))
    assert source.events.counts["a time that cannot be read"] == 3


def test_missing_values_of_frames_are_named(opened, monkeypatch):
    monkeypatch.setattr("rmjax.data.tables.files.ROWS", 4)
    table = frame(ROWS)
    for name, missing in (("user_id", None), ("item_id", float("nan")), ("timestamp", None)):
        column = [*table[name][:5], missing, *table[name][6:]]
        with pytest.raises(ValueError, match=f"the dict, (row 6, )?column {name}: "):
            opened(table | {name: column})
    texts = frame(ROWS, (str, str, int))
    with pytest.raises(ValueError, match="row 1, column item_id: expected an id, found ''"):
        opened(texts | {"item_id": ["", *texts["item_id"][1:]]})


WRONG = [  # (columns that replace right ones; the error)
    (dict(item_id=[1, "1"]), r"types are mixed \(row 1 holds 1 and row 2 holds '1'\): cast it"),
    (dict(item_id=[None, "a", 5]), r"row 2 holds 'a' and row 3 holds 5"),
    (dict(item_id=[1.0, 2.0]), "column item_id: ids are double: cast them to integers or strings"),
    (dict(user_id=[True, False]), "column user_id: ids are bool"),
    (dict(user_id=[2**63, 1]), "column user_id: .* too large .*, or to strings"),
    (dict(user_id=np.array([2**63, 1], np.uint64)), "column user_id: Integer value .* to strings"),
    (dict(timestamp=[True, False]), "column timestamp: bool holds no times: convert it"),
    (dict(timestamp=[1_700_000_000, 1_700_000_000_000]), "mix seconds with milliseconds.*one unit"),
    (dict(user_id=[], item_id=[], timestamp=[]), "no events in 0 rows: take another table"),
    (dict(user_id=[1, 1, 2]), "expected targets in every split, found none of 0 in 'train'.*first"),
]


@pytest.mark.parametrize("columns, says", WRONG)
def test_columns_that_hold_no_events_are_refused(opened, columns, says):
    size = len(next(iter(columns.values())))
    table = dict(user_id=[1] * size, item_id=[2] * size, timestamp=[3] * size) | columns
    with pytest.raises(ValueError, match=says):
        opened(table)


def test_files_and_columns_that_are_missing_are_named(opened, tmp_path):
    path = write(tmp_path / "a.csv", ROWS, ("userId", "item_id", "timestamp"))
    says = r"there is no column 'user_id': did you mean 'userId'\? set config.data.table.user "
    says += r"\(--user of rmjax.recommend\); the "
    with pytest.raises(ValueError, match=f"{says}columns are 'userId', 'item_id', 'timestamp'"):
        opened(path)
    twice = write(tmp_path / "b.csv", ROWS, ("user_id", "user_id", "timestamp"))
    with pytest.raises(ValueError, match="two columns 'user_id'"):
        opened(twice)
    for name, content, words in (
        ("empty.csv", b"", "the file is empty"),
        ("head.csv", b"user_id,item_id,timestamp\n", "no events in 0 rows"),
        (
            "latin.csv",
            "user_id,item_id,timestamp\n1,\xe9,3\n".encode("latin-1"),
            "row 1: .*: save the file as UTF-8",
        ),
        ("bad.parquet", b"PAR1", "cannot be read"),
        ("bad.arrow", b"no arrow", "cannot be read"),
        ("a.xlsx", b"PK", "expected a file that ends in .csv"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*{words}"):
            opened(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="does not exist: set config.data.table.path"):
        opened(tmp_path / "none.csv")
    with pytest.raises(TypeError, match="events are a int: give a path, a data frame"):
        opened(3)


def test_settings_that_do_not_fit_are_refused(opened):
    for options, words in (
        (
            dict(first=4, ask="pairs"),
            "first = 4: must be at least config.data.segment_length = 5.* or lower config.data.seg",
        ),
        (dict(max_items=4), "max_items = 4: must be at least config.data.table.first = 5"),
        (dict(split="tim"), "config.data.table.split = 'tim': must be a string, one of time"),
        (dict(every=0), "config.data.table.every = 0: must be"),
    ):
        with pytest.raises(ValueError, match=words):
            opened(frame(ROWS), **options)
    with pytest.raises(TypeError, match="evry"):
        opened(frame(ROWS), evry=2)
    config = base().data
    config.name = "table"
    with pytest.raises(FileNotFoundError, match="config.data.table.path is empty"):
        make_source(config, 0)


def test_without_pyarrow_the_extra_is_named(opened, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'rmjax\[tables\]'"):
        opened(frame(ROWS))


def test_a_copy_in_another_process_maps_the_same_files(opened):
    source = opened(frame(ROWS))
    copied = pickle.dumps(source)
    assert len(copied) < 2000
    same(source, pickle.loads(copied))


def test_a_removed_file_is_named(opened, tmp_path):
    opened(frame(ROWS), cache_dir=str(tmp_path))
    (file,) = tmp_path.glob("table/*/items")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="items is gone: remove .*prepares it again"):
        opened(frame(ROWS), cache_dir=str(tmp_path))


def test_ids_are_kept_with_a_run(tmp_path, cache):
    """A model opens with its ids, and rows of items follow ids that are strings."""
    options = dict(segment_length=10, first=10, cache_dir=cache)
    rows = [(u, f"item {i}", t) for u, i, t in ROWS]
    source = rmjax.open_table(frame(rows, (int, str, int)), **options)
    config = tiny(**PLAIN, **{"train.steps": 1, "train.eval_every": 1})
    table = rmjax.fit(config, tmp_path / "run", source=source)
    assert [row["memory"] for row in table][:2] == ["gru", "popularity"]
    lines = map(json.loads, (tmp_path / "run" / "items.jsonl").read_text().splitlines())
    kept = [(line["index"], line["id"], line["count"]) for line in lines]
    wanted = zip(range(source.num_items), source.numbering, source.popularity, strict=True)
    assert kept == [*wanted] and isinstance(kept[0][1], str)
    assert "item 11" not in (tmp_path / "run" / "data.json").read_text()
    model = rmjax.open_model(tmp_path / "run")
    assert model.ids.tolist() == source.numbering.tolist()
    assert model.description == source.describe()
    integers = rmjax.open_table(frame(ROWS), **options)
    with pytest.raises(ValueError, match="trained on other items: 30 .such as item 0, item 11"):
        training.evaluate_only(config, tmp_path / "run", integers)
