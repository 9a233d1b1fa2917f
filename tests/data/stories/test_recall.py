"""Recall tasks against a plain reader, which looks at nothing but the items of a stream."""

from __future__ import annotations

import collections
import pickle

import jax
import numpy as np
import pytest

from rmjax import config, tasks
from rmjax.data import make_source
from rmjax.data.pipeline import eval_batches
from rmjax.data.stories.recall import Recall, Settings
from tests.runs import PLAIN, tiny

SPLITS = dict(train=40, valid=30, test=300)
SMALL = dict(key_ids=12, value_ids=6, length=0) | SPLITS
PAIRS = Settings(pairs="4,8,1", **SMALL)
BLANKS = Settings(pairs="3,8", questions=5, **SMALL | {"length": 40})
JOINT = Settings(pairs="2x3,3x4", context_ids=5, **SMALL | {"key_ids": 7})
JOINT_BLANKS = Settings(pairs="2x3,3x4,4x2", context_ids=5, questions=7, **SMALL | {"length": 60})
ALL = pytest.mark.parametrize(
    "settings",
    [PAIRS, BLANKS, JOINT, JOINT_BLANKS],
    ids=["pairs", "blanks", "joint", "joint, blanks"],
)


def fetched(settings, split="test", seed=0):
    source = Recall(settings, seed)
    return source, source.fetch(split, np.arange(source.size(split)))


def read(settings, items):
    """[(question, class of the value, item at which the pair ends)] of the items of one stream."""
    width, first = (3 if settings.context_ids else 2), settings.key_ids
    context, blank = first + settings.value_ids, first + settings.value_ids + settings.context_ids
    pairs, at = [], 0
    while at < len(items):
        if items[at] == blank:
            at += 1
            continue
        assert at % width == 0
        pair = items[at : at + width]
        assert 0 <= pair[-2] < first <= pair[-1] < context
        assert all(context <= item < blank for item in pair[:-2])
        at += width
        pairs.append((tuple(pair[:-1]), pair[-1] - first, at))
    return pairs


def streams(settings):
    """The source, and (index, questions, targets, length, pairs) of each stream."""
    source, examples = fetched(settings)
    lines = []
    for i, length in enumerate(examples["length"]):
        mask = examples["query_mask"][i]
        asked = examples["query"][i][mask].tolist()
        asked = [tuple(words) if settings.context_ids else (words,) for words in asked]
        pairs = read(settings, examples["items"][i][:length].tolist())
        lines.append((i, asked, examples["target"][i][mask].tolist(), length, pairs))
    return source, lines


def close(successes, trials, probability, sigmas=4.5):
    """Whether independent trials of this probability give such a count."""
    deviation = np.sqrt(trials * probability * (1 - probability))
    return abs(successes - trials * probability) < sigmas * deviation + 1e-9


# ---- the streams


@ALL
def test_the_answer_is_the_value_behind_the_key(settings):
    sizes = [[int(n) for n in size.split("x")] for size in settings.pairs.split(",")]
    for i, asked, targets, length, pairs in streams(settings)[1]:
        values = {question: value for question, value, _ in pairs}
        assert len(values) == len(pairs) == np.prod(sizes[i % len(sizes)])
        assert length == (settings.length or len(pairs) * (3 if settings.context_ids else 2))
        assert [values[question] for question in asked] == targets
        assert len({*asked}) == len(asked) == min(settings.questions or len(pairs), len(pairs))


@pytest.mark.parametrize("settings", [JOINT, JOINT_BLANKS], ids=["joint", "joint, blanks"])
def test_neither_the_key_nor_the_context_alone_tells_the_value(settings):
    several = collections.Counter()
    for *_, pairs in streams(settings)[1]:
        contexts, keys = ({question[i] for question, *_ in pairs} for i in (0, 1))
        assert {question for question, *_ in pairs} == {(c, k) for c in contexts for k in keys}
        assert min(len(contexts), len(keys)) > 1
        for place, parts in ((0, contexts), (1, keys)):
            for part in parts:
                values = {value for question, value, _ in pairs if question[place] == part}
                several[place, len(values) > 1] += 1
    assert all(several[place, True] > 2 * several[place, False] for place in (0, 1))


@ALL
def test_keys_values_order_and_questions_are_uniform(settings):
    keys, values, asked = collections.Counter(), collections.Counter(), collections.Counter()
    first = total = together = neighbours = 0
    for _, questions, _, _, pairs in streams(settings)[1]:
        keys.update({question[-1] for question, *_ in pairs})
        values.update(value for _, value, _ in pairs)
        asked.update([question for question, *_ in pairs].index(q) for q in questions[:1])
        if len(pairs) > 1:
            total += 1
            first += pairs[0][0] < pairs[-1][0]
            others = [question for question, *_ in pairs[1:] if question[0] == pairs[0][0][0]]
            together += pairs[1][0][0] == pairs[0][0][0]
            neighbours += len(others) / (len(pairs) - 1)
    assert len(keys) == settings.key_ids and len(values) == settings.value_ids
    assert all(close(n, values.total(), 1 / settings.value_ids) for n in values.values())
    assert max(keys.values()) < 1.5 * min(keys.values())
    assert close(first, total, 0.5)
    assert close(together, total, neighbours / total)  # the order of a context is random
    assert len(asked) == max(len(pairs) for *_, pairs in streams(settings)[1])


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_distances_from_the_end_follow_the_power_law(power):
    settings = Settings(pairs="1", power=power, **SMALL | {"length": 20, "test": 4000})
    examples = fetched(settings)[1]
    at = (examples["items"] < settings.key_ids).argmax(1) // 2
    odds = np.array([distance ** (power - 1) for distance in range(10, 0, -1)])
    counts = np.bincount(at, minlength=10)
    assert all(close(n, 4000, p) for n, p in zip(counts, odds / odds.sum(), strict=True))


# ---- the source


@ALL
def test_groups_are_the_age_and_the_number_of_pairs(settings):
    source, lines = streams(settings)
    groups = source.groups("test")
    ages = [f"age {name}" for name in ("0-25%", "25-50%", "50-75%", "75-100%")]
    counts = {len(pairs) for *_, pairs in lines}
    assert list(groups) == ages + [f"{n} pairs" for n in sorted(counts)]
    mask = fetched(settings)[1]["query_mask"]
    for names in (ages, list(groups)[4:]):
        np.testing.assert_array_equal(np.sum([groups[name] for name in names], 0), mask)
    for i, asked, _, length, pairs in lines:
        ends = {question: end for question, _, end in pairs}
        for q, question in enumerate(asked):
            share = (length - ends[question]) / length
            assert groups[ages[int(share * 4)]][i, q]
            assert groups[f"{len(pairs)} pairs"][i, q]


@ALL
def test_references_know_what_their_names_say(settings, monkeypatch):
    monkeypatch.setattr("rmjax.data.stories.recall._CELLS_AT_ONCE", 1000)  # in several parts
    source, examples = fetched(settings)
    mask, groups = examples["query_mask"], source.groups("test")
    answers = source.references("test")
    right = {name: (chosen == examples["target"])[mask] for name, chosen in answers.items()}
    recent = (groups["age 0-25%"] | groups["age 25-50%"])[mask]
    assert right["oracle"].all() and right["oracle, last half"][recent].all()
    lines = streams(settings)[1]
    for name, place in {"any value of the stream": None, "oracle, key alone": 1}.items():
        if name not in answers:
            assert not settings.context_ids
            continue
        chances = []
        for i, asked, targets, _, pairs in lines:
            for q, (question, target) in enumerate(zip(asked, targets, strict=True)):
                values = [v for k, v, _ in pairs if place is None or k[place] == question[place]]
                assert answers[name][i, q] in values
                chances.append(values.count(target) / len(values))
        assert close(right[name].sum(), len(chances), np.mean(chances))
    assert right["oracle, last half"][~recent].mean() < 0.7
    assert close(right["chance"].sum(), mask.sum(), 1 / settings.value_ids)
    assert {*answers["chance"][mask]} == {*range(settings.value_ids)}


@ALL
def test_a_stream_depends_on_seed_split_and_index_alone(settings):
    source, examples = fetched(settings)
    some = pickle.loads(pickle.dumps(source)).fetch("test", np.array([13, 5, 13, 299]))
    for name, value in some.items():
        np.testing.assert_array_equal(value, examples[name][[13, 5, 13, 299]])
    at = np.arange(30)
    others = [Recall(settings, seed).fetch(s, at) for seed in (0, 1) for s in SPLITS]
    longest = [row.tobytes() for items in others for row in items["items"][1::2]]
    assert len({*longest}) > 0.9 * len(longest)


@ALL
def test_arrays_follow_the_schema(settings):
    source, examples = fetched(settings)
    L, Q, B = source.max_items, source.num_queries, 300
    shapes = {"items": (B, L), "length": (B,), "query": (B, Q), "query_mask": (B, Q)}
    shapes |= {"target": (B, Q), "example_id": (B,)}
    if settings.context_ids:
        shapes |= {"query": (B, Q, 2), "word_mask": (B, Q, 2)}
        np.testing.assert_array_equal(examples["word_mask"].all(-1), examples["query_mask"])
        np.testing.assert_array_equal(examples["word_mask"].any(-1), examples["query_mask"])
    assert {name: value.shape for name, value in examples.items()} == shapes
    dtypes = dict.fromkeys(shapes, "int32") | {"query_mask": "bool", "word_mask": "bool"}
    assert all(value.dtype.name == dtypes[name] for name, value in examples.items())
    beyond = np.arange(L) >= examples["length"][:, None]
    assert (examples["items"][beyond] == 0).all() and examples["length"].max() == L
    assert (examples["query"][~examples["query_mask"]] == 0).all()
    assert (examples["target"][~examples["query_mask"]] == 0).all()
    assert examples["items"].max() == source.num_items - 1
    np.testing.assert_array_equal(examples["example_id"], np.arange(B))
    empty = source.fetch("test", np.arange(0))
    assert {name: value.shape for name, value in empty.items()} == {
        name: (0, *shape[1:]) for name, shape in shapes.items()
    }


def test_the_smallest_task_of_mqar_is_the_default():
    source, examples = fetched(Settings(test=20))
    assert (source.num_items, source.max_items, source.num_queries) == (8192, 64, 4)
    assert all(len(read(source.settings, row.tolist())) == 4 for row in examples["items"])


# ---- as a task


def of(settings, **changes):
    values = {f"data.recall.{name}": value for name, value in vars(settings).items()}
    return tiny(**PLAIN | {"data.name": "recall", "data.segment_length": 6} | values | changes)


@pytest.mark.parametrize("settings", [BLANKS, JOINT_BLANKS], ids=["pairs", "joint"])
def test_machines_answer_items_and_pairs_of_words_with_classes(settings):
    values = of(settings)
    source = make_source(values.data, 0)
    task = tasks.make_task(values, source)
    batch = next(iter(eval_batches(source, "valid", seed=0, batch_size=4, segment_length=6)))
    params = jax.eval_shape(task.init, jax.random.key(0))
    scores = jax.eval_shape(task.scores, params, batch)
    assert scores.shape == (4, source.num_queries, settings.value_ids)


def test_a_segment_splits_a_pair_only_on_request():
    for settings, length, width in ((PAIRS, 5, 2), (JOINT, 8, 3)):
        message = f"segment_length = {length}: must be a multiple of {width}, so that no pair"
        with pytest.raises(ValueError, match=message):
            make_source(of(settings, **{"data.segment_length": length}).data, 0)
        changes = {"data.segment_length": length, "data.recall.split": True}
        assert make_source(of(settings, **changes).data, 0).size("test") == 300


@pytest.mark.parametrize(
    "wrong, cause",
    [
        ({"pairs": "4,x"}, "pairs = 4,x: must be numbers such as '4,8'"),
        ({"pairs": "0"}, "pairs = 0: must be numbers"),
        ({"pairs": "2x3x4"}, "pairs = 2x3x4: must be numbers"),
        (
            {"pairs": "2x3"},
            "pairs = 2x3: has the form contexts x keys if .*context_ids = 0 is above",
        ),
        (
            {"context_ids": 3},
            "pairs = 4: has the form contexts x keys if .*context_ids = 3 is above",
        ),
        ({"pairs": "4x2", "context_ids": 3}, "pairs = 4x2: a stream has at most .*context_ids = 3"),
        ({"pairs": "13"}, "pairs = 13: the keys of a stream differ, so .*key_ids = 12"),
        ({"length": 9}, "length = 9: must be a multiple of 2"),
        ({"length": 6}, "length = 6: has no room for .*pairs = 4 of 2 items"),
    ],
)
def test_settings_that_conflict_are_named(wrong, cause):
    values = of(Settings(pairs="4", **SMALL))
    values.data.recall.update(wrong)
    with pytest.raises(ValueError, match=f"config.data.recall.{cause}"):
        config.validate(values)
        make_source(values.data, 0)


def test_a_wrong_request_is_named_with_the_allowed_values():
    with pytest.raises(ValueError, match="dev.*train.*valid.*test"):
        Recall(PAIRS).size("dev")
    with pytest.raises(ValueError, match=r"\[300, -1\].*\[0, 300\)"):
        Recall(PAIRS).fetch("test", np.array([300, 1, -1]))
