"""Recommendations: those of a full sort, in the ids of the data, one by one or many at once."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from absl import flags

from rmjax import tasks
from rmjax.serve import Model, Recommended, recommend
from rmjax.serve.recommend_all import _check_flags, recommend_all
from tests.runs import tiny
from tests.shop import Shop, ShopSource
from tests.small import noise

ITEMS = 40
IDS = tuple(f"SKU-{(7 * k) % ITEMS:02d}" for k in range(ITEMS))


@pytest.fixture(scope="module", params=["last", "next"])
def model(request):
    config = tiny(
        **{"machine.kind": "gru", "ranking.question": request.param, "data.segment_length": 4}
    )
    source = ShopSource(Shop(users=6, items=ITEMS, shortest=4, longest=17))
    source.numbering = np.array(IDS, object)
    description = source.describe()
    task = tasks.make_task(config, description)
    return Model(config, task, noise(task.init), description)


def histories():
    rng = np.random.default_rng(0)
    return [[IDS[i] for i in rng.integers(0, ITEMS, n)] for n in (5, 0, 1, 23, 4, 9)]


def expected(model, history, k, exclude_seen):
    """The k best items by a sort of all scores, which a store of live streams gives."""
    store = model.streams()
    store.write(["user"], [[IDS.index(one) for one in history]])
    scores = store.answer(["user"], [[0]])[0][0].astype(np.float64)
    if exclude_seen:
        scores[[IDS.index(one) for one in history]] = -np.inf
    best = [i for i in np.argsort(-scores, kind="stable")[:k] if np.isfinite(scores[i])]
    return [IDS[i] for i in best], scores[best]


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_the_best_items_are_those_of_a_full_sort(model, exclude_seen):
    several = model.recommend(histories(), k=5, exclude_seen=exclude_seen)
    for history, shown in zip(histories(), several, strict=True):
        items, scores = expected(model, history, 5, exclude_seen)
        assert [one.item for one in shown] == items
        np.testing.assert_allclose([one.score for one in shown], scores, rtol=1e-5, atol=1e-5)


def test_one_history_a_list_of_histories_and_a_store_agree(model):
    several = model.recommend(histories(), k=3, exclude_seen=False)
    store = model.streams()
    for user, history in enumerate(histories()):
        for one, alike in zip(
            model.recommend(history, k=3, exclude_seen=False), several[user], strict=True
        ):
            assert one.item == alike.item and one.score == pytest.approx(alike.score, rel=1e-5)
        store.write([user], [[IDS.index(one) for one in history]])
    users = [*range(len(several)), "new"]
    of_store = model.recommend(store=store, users=users, k=3)
    for row, alike in zip(of_store, [*several, several[1]], strict=True):  # history 1 is empty
        assert [one.item for one in row] == [one.item for one in alike]
    left_out = [[one.item for one in row] for row in of_store]
    others = model.recommend(store=store, users=users, k=3, exclude=left_out)
    assert not any(
        {one.item for one in row} & {*out} for row, out in zip(others, left_out, strict=True)
    )


def test_unknown_items_are_left_out_and_named(model, caplog):
    known = histories()[0]
    shown = model.recommend([*known[:2], "SKU-99", *known[2:], "?"], k=4)
    assert shown == model.recommend(known, k=4)
    text = "2 items are unknown to the model, so left out: 'SKU-99', '?'; it knows ids such as "
    assert text in caplog.text
    for history in (["SKU-99"], [1.5, None]):  # as a user without items
        assert model.recommend(history, k=4) == model.recommend([], k=4)
    assert model.recommender.names.indices(["x", IDS[3]]).tolist() == [-1, 3]


def test_all_items_that_were_not_seen_compete(model):
    """Also the item of index 0, which fills up histories of different lengths."""
    shown = model.recommend([IDS[3:6], IDS[3:8]], k=ITEMS, exclude_seen=True)
    assert [{one.item for one in row} for row in shown] == [
        {*IDS} - {*IDS[3:6]},
        {*IDS} - {*IDS[3:8]},
    ]


def test_fewer_items_than_k_are_left(model):
    shown = model.recommend([*IDS[:-2]], k=5, exclude_seen=True)
    assert {one.item for one in shown} == {*IDS[-2:]} and isinstance(shown[0], Recommended)
    for wrong in (0, ITEMS + 1):
        with pytest.raises(ValueError, match=rf"k = {wrong}: must be from 1 to .* {ITEMS}"):
            model.recommend(IDS[:3], k=wrong)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_every_user_of_a_table_gets_the_recommendations_of_the_history(model, tmp_path, ending):
    events = {"who": [], "what": [], "when": []}
    for user, history in enumerate(histories()):
        for time, item in enumerate([*history, "SKU-99"][-6:] if history else []):
            for name, value in zip(events, (f"u{user}", item, time), strict=True):
                events[name].append(value)
    columns = {"user": "who", "item": "what", "time": "when"}
    model.config.data.cache_dir = str(tmp_path)
    out = tmp_path / f"recs.{ending}"
    count = recommend_all(model, events, out, k=4, latest=5, columns=columns)
    shown = (pa.csv.read_csv if ending == "csv" else pq.read_table)(out).to_pylist()
    users = sorted({*events["who"]})
    assert count == len(users) and [row["user"] for row in shown] == [
        u for u in users for _ in range(4)
    ]
    for user in users:
        rows = [row for row in shown if row["user"] == user]
        history = histories()[int(user[1:])][-4:]  # the latest of 5 events is unknown
        wanted = model.recommend(history, k=4)
        assert [row["item"] for row in rows] == [one.item for one in wanted]
        assert [row["rank"] for row in rows] == [1, 2, 3, 4]
        scores = [one.score for one in wanted]
        np.testing.assert_allclose([row["score"] for row in rows], scores, rtol=1e-5)


class Labelled(dict):
    """A column of values under labels, as a series of pandas: it iterates over values."""

    def __iter__(self):
        return iter(self.values())

    def __array__(self, dtype=None, copy=None):
        return np.array(list(self), dtype)


def table(*rows):
    """A table of (user, item, time), or of (user, session, item, time)."""
    names = ("user_id", "session", "item_id", "timestamp")
    names = names if len(rows[0]) == 4 else (names[0], *names[2:])
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def written(model, tmp_path, events, k=3, **options):
    """{user: items} of the recommendations for all users of a table."""
    model.config.data.cache_dir = str(tmp_path)
    recommend_all(model, events, tmp_path / "recs.parquet", k, **options)
    shown = pq.read_table(tmp_path / "recs.parquet").to_pylist()
    return {user: [row["item"] for row in shown if row["user"] == user] for user in "ab"}


def test_the_latest_session_is_the_one_that_ends_last(model, tmp_path):
    early, late = IDS[3:9], IDS[20:25]
    events = table(
        *[("a", 7, item, time) for time, item in enumerate(early)],
        *[("a", 2, item, 100 + time) for time, item in enumerate(late)],  # its id is smaller
        *[("b", 1, item, time) for time, item in enumerate(late)],
        *[("b", 4, item, 100 + time) for time, item in enumerate(early)],
    )
    columns = {"session": "session"}
    shown = written(model, tmp_path, events, 9, exclude_seen=False, columns=columns)
    named = lambda items: [
        one.item for one in model.recommend(list(items), k=9, exclude_seen=False)
    ]
    assert named(late) != named(early)
    assert shown == {"a": named(late), "b": named(early)}


@pytest.mark.parametrize("sessions", [False, True])
def test_items_of_all_streams_are_left_out_whatever_is_read(model, tmp_path, sessions):
    history = {"a": IDS[:34], "b": IDS[5:9]}
    rows = [(u, t // 3, item, t) for u in history for t, item in enumerate(history[u])]
    events = table(*(rows if sessions else [(u, *others) for u, _, *others in rows]))
    columns = {"session": "session"} if sessions else {}
    shown = written(
        model, tmp_path, events, 4, exclude_seen=True, latest=0 if sessions else 2, columns=columns
    )
    for user, seen in history.items():
        read = seen[-1:] if sessions else seen[-2:]
        ranked = model.recommend(read, k=ITEMS, exclude_seen=False)
        assert shown[user] == [one.item for one in ranked if one.item not in seen][:4]


def test_exclusion_lists_of_any_length_agree(model, monkeypatch):
    """The histories are short, and the lists are padded to widths of their own."""
    rng, ranked = np.random.default_rng(1), model.recommender
    histories = [rng.integers(0, ITEMS, n).astype(np.int32) for n in (3, 4, 1, 0, 2)]
    seen = [rng.integers(0, ITEMS, n).astype(np.int32) for n in (0, 5, 30, 9, 100)]
    everything = ranked.best(histories, ITEMS, exclude_seen=False).items
    for cells in (recommend._CELLS, 32):  # with 32, few rows fit in a call
        monkeypatch.setattr(recommend, "_CELLS", cells)
        best = ranked.best(histories, 4, exclude_seen=True, seen=seen).items
        for row, order, out in zip(best.tolist(), everything.tolist(), seen, strict=True):
            assert row == ([i for i in order if i not in out] + [-1] * 4)[:4]


def test_groups_hold_every_history_once_and_few_cells(monkeypatch):
    monkeypatch.setattr(recommend, "_CELLS", 64)
    rng = np.random.default_rng(2)
    lengths, left_out = rng.integers(0, 50, 99), rng.integers(0, 200, 99)
    groups = [*recommend._parts(lengths, left_out, 4)]
    assert sorted(np.concatenate([rows for rows, _, _ in groups]).tolist()) == [*range(99)]
    for rows, size, width in groups:
        assert (lengths[rows] <= size).all() and (left_out[rows] <= width).all()
        assert len(rows) == 1 or len(rows) * max(size, width) <= 64
    assert len({group[1:] for group in groups}) <= 5 * 6


def test_seen_items_are_left_out_where_the_evaluation_did(model, tmp_path):
    history, counts = [*IDS[2:30]], []
    events = table(*[(user, item, t) for user in "ab" for t, item in enumerate(history)])
    questions = model.description.questions._replace(exclude_seen=True)
    description = dataclasses.replace(model.description, questions=questions)
    task = tasks.make_task(model.config, description)
    strict = dataclasses.replace(model, task=task, description=description)
    for one, default in ((model, False), (strict, True)):
        assert one.recommend(history) == one.recommend(history, exclude_seen=default)
        shown = [{r.item for r in one.recommend(history, k=ITEMS, exclude_seen=e)} for e in (0, 1)]
        assert shown == [{*IDS}, {*IDS} - {*history}]
        counts.append(len(written(one, tmp_path, events, ITEMS)["a"]))
    assert counts == [ITEMS, ITEMS - len(history)]


def test_a_user_who_has_every_item_gets_no_row_and_keeps_the_type(model, tmp_path, monkeypatch):
    monkeypatch.setattr("rmjax.serve.recommend_all._USERS", 1)
    events = table(*[("a", item, t) for t, item in enumerate(IDS)], ("b", IDS[0], 1))
    shown = written(model, tmp_path, events, exclude_seen=True)
    assert shown["a"] == [] and len(shown["b"]) == 3


def test_a_missing_folder_is_named_before_anything_is_read(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"recs does not exist: make this folder"):
        recommend_all(model, tmp_path / "no.csv", tmp_path / "recs" / "recs.csv")


def test_a_store_takes_the_ids_of_the_data(model, caplog):
    store, index = model.streams(), model.streams()
    model.write(store, ["a", "b"], [[IDS[4], "SKU-99", IDS[7]], np.array(IDS[9:12], object)])
    index.write(["a", "b"], [[4, 7], [9, 10, 11]])
    assert "1 items are unknown to the model, so left out: 'SKU-99'" in caplog.text
    for one, other in zip(
        *(model.recommend(store=s, users=["a", "b"], k=4) for s in (store, index)), strict=True
    ):
        assert one == other
    with pytest.raises(ValueError, match=r"must be a whole number.*model\.write"):
        store.write(["a"], [[IDS[4]]])
    with pytest.raises(ValueError, match=r"history is 'SKU-01'.*\['SKU-01'\]"):
        model.write(store, ["a"], ["SKU-01"])


def test_histories_are_sequences_of_any_kind(model):
    history = [*IDS[3:8]]
    wanted = model.recommend(history, k=3)
    series = Labelled(zip(range(5, 10), history, strict=True))  # as a series of pandas
    for alike in (tuple(history), np.array(history), np.array(history, object), series):
        assert model.recommend(alike, k=3) == wanted
        assert [r.item for r in model.recommend([alike, history[:1]], k=3)[0]] == [
            r.item for r in wanted
        ]
    assert model.recommend([], k=3) == model.recommend(k=3) != wanted
    store = model.streams()
    for wrong, options, error in (
        ("SKU-01", {}, r"history is 'SKU-01'.*\['SKU-01'\]"),
        ([history, "SKU-01"], {}, r"history is 'SKU-01'"),
        (history, {"store": store, "users": ["a"]}, r"history and store.*model\.write"),
        ((), {"store": store, "users": ["a"], "exclude_seen": True}, r"no list .*exclude="),
        (history, {"exclude": [history]}, r"users and exclude belong to a store"),
        (history, {"users": ["a"]}, r"users and exclude belong to a store"),
    ):
        with pytest.raises(ValueError, match=error):
            model.recommend(wrong, k=3, **options)


def test_tables_without_any_known_item_and_other_endings_are_refused(model, tmp_path):
    model.config.data.cache_dir = str(tmp_path)
    events = {"user_id": ["a", "a"], "item_id": ["x", "y"], "timestamp": [1, 2]}
    with pytest.raises(
        ValueError, match=r"knows none of the 2 items: they are like 'x'.* 'SKU-00'"
    ):
        recommend_all(model, events, tmp_path / "recs.csv")
    with pytest.raises(ValueError, match=r"must end in \.parquet or \.csv"):
        recommend_all(model, events, tmp_path / "recs.json")
    assert not [*tmp_path.glob("recs*")]


def test_what_is_left_out_of_a_table_is_counted(model, tmp_path, caplog):
    caplog.set_level("INFO")
    rows = [("a", s, IDS[t], 10 * s + t) for s in (1, 2) for t in range(6)]
    events = table(*rows, rows[0], ("b", 1, IDS[0], None), ("b", 1, IDS[1], 3), ("", 1, IDS[1], 3))
    columns = {"session": "session", "bad_rows": "skip"}
    written(model, tmp_path, events, latest=4, columns=columns)
    text = caplog.text.replace("1 no id, 1 no time", "1 no time, 1 no id")
    left = "left out: 1 no time, 1 no id, 1 duplicates"
    assert f"2 users, 6 items, 13 events of 16 rows; {left}" in text
    latest = "those of each user's latest session, and of these the latest 4"
    assert f"Read: 5 of 13 events: {latest}" in text


def parsed(*given):
    """The flags that the command checks, in values of their own."""
    values = flags.FlagValues()
    for name in ("workdir", "events", "out", "store"):
        flags.DEFINE_string(name, "", "", flag_values=values)
    flags.DEFINE_integer("k", 10, "", flag_values=values)
    flags.DEFINE_bool("exclude_seen", None, "", flag_values=values)
    values(["main", "--workdir=runs/shop", *given])
    return values


def test_the_flags_say_what_to_write():
    for given, error in (
        (["--out=a.csv"], "--events is missing"),
        (["--events=e.csv"], "--out and --store are missing: --out=recs.csv writes"),
        (["--events=e.csv", "--store=s", "--k=5"], "--k is about recommendations: add --out"),
        (["--events=e.csv", "--store=s", "--noexclude_seen"], "--exclude_seen is about"),
    ):
        with pytest.raises(ValueError, match=error):
            _check_flags(parsed(*given))
    for written in (["--out=a.csv", "--k=5"], ["--store=s"], ["--out=a.csv", "--store=s"]):
        _check_flags(parsed("--events=e.csv", *written))


def test_the_command_names_missing_flags_and_has_help():
    run = lambda *flags: subprocess.run(
        [sys.executable, "-m", "rmjax.recommend", *flags], capture_output=True, text=True
    )
    done = run("--workdir=runs/shop")
    assert done.returncode == 1 and "--events is missing" in done.stderr
    shown = run("--help").stdout
    assert all(
        f"--{name}" in shown for name in ("events", "kinds", "item", "latest", "[no]exclude_seen")
    )
