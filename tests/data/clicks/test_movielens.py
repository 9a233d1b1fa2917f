import codecs
import logging

import numpy as np
import pytest

from rmjax.data.clicks.movielens import ADVICE, match_popularity, open_movielens, read_ratings
from rmjax.data.source import hash64
from tests import FIXTURES

FIXTURE = FIXTURES / "movielens"
OPTIONS = dict(first=5, every=4, max_targets=3, test_fraction=0.3, valid_fraction=0.2)
SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_movielens(str(FIXTURE), str(tmp_path_factory.mktemp("cache")), seed=0, **OPTIONS)


@pytest.fixture(scope="module")
def logs():
    """{user: [(time, movie number)] by time, then by hash}, read independently of the source."""
    rows = [line.split(",") for line in (FIXTURE / "ratings.csv").read_text().splitlines()[1:]]
    numbers = {movie: i for i, movie in enumerate(sorted({int(row[1]) for row in rows}))}
    users: dict = {}
    for user, movie, _, time in rows:
        tie = int(hash64("movielens tie", 0, int(user), int(movie)))
        users.setdefault(int(user), []).append((int(time), tie, numbers[int(movie)]))
    return {user: [(time, item) for time, _, item in sorted(log)] for user, log in users.items()}


def questions(source, split):
    """Yields (user, stream, items before, positive, negative) of every question of `split`."""
    examples = source.fetch(split, np.arange(source.size(split)))
    for row, user in enumerate(source.stream_id(split)):
        asked = int(examples["query_mask"][row].sum())
        assert examples["query_mask"][row, :asked].all() and asked % 2 == 0
        stream = examples["items"][row, : examples["length"][row]]
        names = ("query", "position", "target")
        query, position, target = (examples[name][row, :asked] for name in names)
        assert (target == np.tile([1, 0], asked // 2)).all()
        assert (position[::2] == position[1::2]).all() and position.max() == len(stream)
        assert (np.diff(position[::2]) == OPTIONS["every"]).all()
        pairs = zip(position[::2], query[::2], query[1::2], strict=True)
        yield from ((user, stream, *pair) for pair in pairs)


def test_a_question_asks_for_the_next_item(source, logs):
    asked = []
    for split in SPLITS:
        for user, stream, position, positive, _ in questions(source, split):
            log = [item for _, item in logs[user]]
            assert stream[:position].tolist() == log[:position] and log[position] == positive
            asked.append((user, position))
    places = lambda log: range(OPTIONS["first"], len(log), OPTIONS["every"])
    wanted = [(user, place) for user, log in logs.items() for place in places(log)]
    assert sorted(asked) == sorted(wanted)  # every target is asked once, in one split


def test_splits_are_separated_in_time(source, logs):
    times = {split: [logs[u][p][0] for u, _, p, *_ in questions(source, split)] for split in SPLITS}
    assert max(times["train"]) < min(times["valid"]) <= max(times["valid"]) < min(times["test"])
    total = sum(map(len, times.values()))
    assert abs(len(times["test"]) / total - OPTIONS["test_fraction"]) < 0.1
    for split, later in (("train", "valid"), ("valid", "test")):  # streams end before the cut
        for user, stream, *_ in questions(source, split):
            assert logs[user][len(stream) - 1][0] < min(times[later])


def test_negatives_are_never_rated_by_the_user(source, logs):
    for split in SPLITS:
        for user, _, _, _, negative in questions(source, split):
            assert negative not in {item for _, item in logs[user]}


def test_popularity_counts_the_training_part_only(source, logs):
    end = min(logs[u][p][0] for u, _, p, *_ in questions(source, "valid"))
    counts = np.zeros(source.num_items, int)
    for log in logs.values():
        for time, item in log:
            counts[item] += time < end
    np.testing.assert_array_equal(source.popularity, counts)


def test_sizes_are_the_largest_of_all_examples(source):
    examples = [source.fetch(split, np.arange(source.size(split))) for split in SPLITS]
    assert source.max_items == max(e["length"].max() for e in examples)
    assert source.num_queries == max(e["query_mask"].sum(1).max() for e in examples)
    assert source.num_queries == 2 * OPTIONS["max_targets"]
    assert not source.positions_at_end
    for split, e in zip(SPLITS, examples, strict=True):
        assert e["example_id"].tolist() == list(range(source.size(split)))
        assert e["items"].max() < source.num_items and e["position"].dtype == np.int32


def test_negatives_match_popularity():
    rng = np.random.default_rng(0)
    users, items = 60, 4000
    popularity = np.sort(rng.integers(0, 300, items))[::-1].copy()
    popularity[-1500:] = 0
    owner = np.repeat(np.arange(users), 50)
    item = np.concatenate([rng.choice(items, 50, replace=False) for _ in range(users)])
    asked = np.arange(20, users * 50, 10)
    negatives = match_popularity(asked, owner, item, popularity, 0)[asked]
    positives = item[asked]
    np.testing.assert_array_equal(popularity[positives] == 0, popularity[negatives] == 0)
    assert np.abs(popularity[positives] - popularity[negatives]).max() < 10
    other_seed = match_popularity(asked, owner, item, popularity, 1)[asked]
    assert len(np.unique(other_seed == negatives)) == 2
    # The draws of a user do not depend on the other users.
    some = asked[owner[asked] < 7]
    of_some = match_popularity(some, owner, item, popularity, 0)[some]
    np.testing.assert_array_equal(of_some, negatives[: len(some)])


def test_negatives_when_few_are_left():
    item = np.array([0, 1, 2, 3, 5])  # only item 4 of six, unseen in training, is left
    popularity = np.array([9, 8, 7, 6, 0, 5])
    assert match_popularity(np.array([4]), np.zeros(5, int), item, popularity, 0)[4] == 4
    with pytest.raises(ValueError, match="rated every item"):
        match_popularity(np.array([4]), np.zeros(5, int), np.arange(5), popularity[:5], 0)


@pytest.mark.parametrize("changed", [dict(seed=1), dict(every=5), dict(max_targets=2)])
def test_other_parameters_give_other_data(source, tmp_path, changed):
    args = dict(seed=0, **OPTIONS)
    same = open_movielens(str(FIXTURE), str(tmp_path), **args)
    other = open_movielens(str(FIXTURE), str(tmp_path), **(args | changed))
    queries = lambda s: s.fetch("train", np.arange(s.size("train")))["query"]
    first, second, third = map(queries, (source, same, other))
    np.testing.assert_array_equal(first, second)
    assert first.shape != third.shape or (first != third).any()


def test_older_releases_have_the_same_ratings(tmp_path):
    rows = [line.split(",") for line in (FIXTURE / "ratings.csv").read_text().splitlines()[1:]]
    (tmp_path / "ratings.dat").write_text("\n".join("::".join(row) for row in rows))
    (tmp_path / "u.data").write_text("".join("\t".join(row) + "\r\n" for row in rows))
    want = read_ratings(FIXTURE / "ratings.csv")
    for name in ("ratings.dat", "u.data"):
        for got, column in zip(read_ratings(tmp_path / name), want, strict=True):
            np.testing.assert_array_equal(got, column)


WRONG = [  # (line number; new text; field and expected of the error)
    (1, "user,movie,rating,timestamp", "header", "'userId,movieId,rating,timestamp', found 'user,"),
    (3, "1,2,3.0", "timestamp", "4 fields split by ',', found '1,2,3.0'"),
    (3, "1,2,3.0,4,5", "timestamp", "4 fields split by ',', found '1,2,3.0,4,5'"),
    (3, "", "movieId", "4 fields split by ',', found ''"),
    (2, "-1,2,3.0,4", "userId", "an integer of 0 or more, found '-1'"),
    (2, "1,x,3.0,4", "movieId", "an integer of 0 or more, found 'x'"),
    (4, "1,2,6.0,4", "rating", "a rating from 0 to 5, found '6.0'"),
    (4, "1,2,good,4", "rating", "a rating from 0 to 5, found 'good'"),
    (4, "1,2,3.0,4.5", "timestamp", "an integer of 0 or more, found '4.5'"),
]


@pytest.mark.parametrize("number, text, field, expected", WRONG)
def test_a_malformed_line_is_named_and_leaves_nothing(tmp_path, number, text, field, expected):
    lines = (FIXTURE / "ratings.csv").read_text().splitlines()
    lines[number - 1] = text
    (tmp_path / "ratings.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError) as error:
        open_movielens(str(tmp_path), str(tmp_path / "cache"), 0, **OPTIONS)
    start, message = (
        f"{tmp_path / 'ratings.csv'}, line {number}, field {field}: expected ",
        str(error.value),
    )
    assert message.startswith(start) and expected.replace("'", "") in message.replace("'", "")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


TOO_LONG = "an integer of at most 18 digits"


@pytest.mark.parametrize("digits", ["9223372036854775808", "1" * 5000])
@pytest.mark.parametrize("field", ["userId", "movieId", "timestamp"])
def test_numbers_beyond_64_bits_are_named(tmp_path, field, digits):
    row = {"userId": "1", "movieId": "2", "rating": "3.0", "timestamp": "4"}
    good, bad = ("::".join(values) for values in (row.values(), (row | {field: digits}).values()))
    (tmp_path / "ratings.dat").write_text("\n".join([*[good] * 5000, bad, good]))
    says = f"line 5001, field {field}: expected {TOO_LONG}, found '"
    with pytest.raises(ValueError, match=says) as error:
        read_ratings(tmp_path / "ratings.dat")
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400


def test_byte_order_marks_and_line_ends_change_nothing(tmp_path, caplog):
    want, path = read_ratings(FIXTURE / "ratings.csv"), tmp_path / "ratings.csv"
    body = (FIXTURE / "ratings.csv").read_bytes()
    variants = [codecs.BOM_UTF8 + body, body.replace(b"\n", b"\r\n"), body + b"\n\r\n"]
    for data in (*variants, body.decode().encode("utf-16")):
        path.write_bytes(data)
        np.testing.assert_array_equal(read_ratings(path), want)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_file_cut_short_is_refused_or_warned_about(tmp_path, caplog):
    """Every cut of the last line is refused, or leaves four fields and a warning."""
    path = tmp_path / "ratings.csv"
    head, last = "userId,movieId,rating,timestamp\n1,2,3.0,4\n", "12,34,4.5,678"
    for length in range(1, len(last) + 1):
        caplog.clear()
        path.write_text(head + last[:length])
        if length > len("12,34,4.5,"):
            assert len(read_ratings(path)[0]) == 2
            assert "line 3, the last, has no end" in caplog.text
        else:
            with pytest.raises(ValueError, match="ratings.csv, line 3, field "):
                read_ratings(path)


def test_the_order_of_lines_does_not_matter(source, tmp_path):
    header, *rows = (FIXTURE / "ratings.csv").read_text().splitlines()
    orders = (rows[::-1], np.random.default_rng(0).permutation(rows).tolist())
    for number, order in enumerate(orders):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "ratings.csv").write_text("\n".join([header, *order]) + "\n")
        other = open_movielens(str(folder), str(tmp_path / "cache"), seed=0, **OPTIONS)
        for split in SPLITS:
            want, got = (s.fetch(split, np.arange(source.size(split))) for s in (source, other))
            for name, values in want.items():
                np.testing.assert_array_equal(got[name], values, err_msg=f"{split} {name}")


def test_equal_times_are_in_no_order_of_ids(tmp_path):
    """The order differs between users and between seeds too."""
    lines = [f"{user},{movie},3.0,{user}" for user in range(40) for movie in range(30)]
    content = "\n".join(["userId,movieId,rating,timestamp", *lines, ""])
    options = dict(first=20, every=100, test_fraction=0.3, valid_fraction=0.3)
    streams = []
    for seed in (0, 1):
        # The negatives are films that one user of many rated.
        extra = "".join(f"{900 + k},{1000 + k},3.0,0\n" for k in range(50))
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "ratings.csv").write_text(content + extra)
        made = open_movielens(str(folder), str(tmp_path / "cache"), seed, **options)
        streams.append(made.fetch("train", np.arange(made.size("train")))["items"])
    assert (np.diff(streams[0]) > 0).mean() == pytest.approx(0.5, abs=0.1)
    assert (streams[0] != streams[1]).mean() > 0.8
    assert (streams[0][1:] != streams[0][:-1]).mean() > 0.8


def test_references_are_popularity_and_the_distance_from_the_last_item(source):
    got = source.references("test")
    assert got.keys() == {"popularity", "nearest id"}
    examples = source.fetch("test", np.arange(source.size("test")))
    for row, column in np.argwhere(examples["query_mask"]):
        query = examples["query"][row, column]
        last = examples["items"][row, examples["position"][row, column] - 1]
        assert got["popularity"][row, column] == source.popularity[query]
        assert got["nearest id"][row, column] == -abs(int(query) - int(last))


def test_movie_ids_are_kept(source):
    rows = [line.split(",") for line in (FIXTURE / "ratings.csv").read_text().splitlines()[1:]]
    assert source.numbering.tolist() == sorted({int(row[1]) for row in rows})


def test_users_who_are_not_asked_are_counted(tmp_path, caplog, logs):
    # One user has fewer items, and no other user does.
    first = sorted(map(len, logs.values()))[1]
    few = sum(len(log) < first + 1 for log in logs.values())
    assert 0 < few < len(logs)
    for _ in range(2):  # prepared or not
        caplog.clear()
        with caplog.at_level(logging.INFO, "absl"):
            open_movielens(str(FIXTURE), str(tmp_path), 0, **OPTIONS | dict(first=first, every=1))
        assert f"{len(logs) - few} of {len(logs)} users are asked" in caplog.text
        says = f"{few} users have fewer than {first + 1} ratings, so none of theirs is asked"
        assert says in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "absl"):
        open_movielens(str(FIXTURE), str(tmp_path), 0, **OPTIONS)
    assert "fewer" not in caplog.text


def test_a_split_without_targets_is_refused(tmp_path):
    says = "expected targets in every split, found none of 0 in 'train'"
    with pytest.raises(ValueError, match=says):
        open_movielens(str(FIXTURE), str(tmp_path), 0, first=1000)


def test_missing_files_say_where_they_come_from(tmp_path):
    for directory in ("", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match="grouplens.org/datasets/movielens") as error:
            open_movielens(directory, str(tmp_path), 0)
        assert "ratings.csv" in str(error.value) and ADVICE in str(error.value)


def test_hash_is_fixed_and_even():
    assert hash64("a", 1, np.array([2, -3])).tolist() == [hash64("a", 1, 2), hash64("a", 1, -3)]
    draws = hash64("even", 0, np.arange(10000)[:, None], np.arange(4)) % np.uint64(10)
    counts = np.bincount(draws.ravel().astype(int), minlength=10)
    assert ((counts - 4000) ** 2 / 4000).sum() < 28  # chi-squared, 9 degrees of freedom: p > 0.001
    parts = [("a", 1, 2), ("a", 2, 1), ("b", 1, 2), ("a", 1), ("a", 1, 2, 0)]
    assert len({int(hash64(*values)) for values in parts}) == 5


def test_a_user_who_rated_every_film_is_named_with_the_file(tmp_path):
    rows = [f"{user},{movie},3.0,{1000 + user + movie}" for user in (1, 2) for movie in range(1, 9)]
    (tmp_path / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *rows, ""]))
    says = r"ratings\.csv: user \d rated every item: no negative is left"
    with pytest.raises(ValueError, match=says):
        open_movielens(str(tmp_path), str(tmp_path / "cache"), 0, first=2, every=1)


def test_the_error_of_another_kind_of_table_names_a_cure(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_bytes(b"PK\x03\x04\x14\x00\x06\x00")
    says = "ratings.csv is a zip or an Excel table: export it as CSV, or unpack it"
    with pytest.raises(ValueError, match=says):
        read_ratings(path)
    path.write_text("userId\tmovieId\trating\ttimestamp\n1\t2\t3\t4\n")
    says = "line 1, field header: .* or write these four columns separated by commas"
    with pytest.raises(ValueError, match=says):
        read_ratings(path)
