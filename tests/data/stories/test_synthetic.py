import dataclasses
import functools
import itertools
import pickle

import jax
import numpy as np
import pytest

from rmjax.data.stories import evidence as source_of_evidence
from rmjax.data.stories.evidence import Synthetic, SyntheticConfig, draw, generate, make_world
from tests.oracles import synthetic as plain

# A crowded world: a third or more of the first draws of a stream hold another answer's evidence.
TINY = SyntheticConfig(facts=24, length=41, queries=4, answers=6, evidence=3, groups=2, window=0.24)
DISCRETE = dataclasses.replace(TINY, placing="discrete")
EDGES = dataclasses.replace(TINY, edge=0.2, window=0.15)
QUARTERS = dataclasses.replace(DISCRETE, parts=4)
DISTRACTED = dataclasses.replace(DISCRETE, distractors=2)
BOTH = pytest.mark.parametrize("config", [TINY, DISCRETE], ids=["consecutive", "discrete"])
ALL = pytest.mark.parametrize(
    "config",
    [TINY, DISCRETE, QUARTERS, DISTRACTED, EDGES],
    ids=["consecutive", "discrete", "quarters", "distracted", "edges"],
)


@functools.cache
def drawn(config, many=600, seed=0):
    """(world, streams, what was planted, part of the evidence) of the first test streams."""
    world = make_world(config, seed)
    streams, planted = jax.device_get(draw(config, world, seed, 2, np.arange(many, dtype=np.int32)))
    return world, streams, planted, np.arange(many) // config.chains % config.parts


def bounds(config, part):
    if config.edge:
        size = round(config.edge * config.length)
        return (0, size) if part == 0 else (config.length - size, config.length)
    return part * config.length // config.parts, (part + 1) * config.length // config.parts


def close(successes, trials, probability, sigmas=4.5):
    """Whether independent trials of this probability give such a count."""
    deviation = np.sqrt(trials * probability * (1 - probability))
    return abs(successes - trials * probability) < sigmas * deviation + 1e-9


# ---- the world


@pytest.mark.parametrize("config", [SyntheticConfig(), TINY], ids=["default", "tiny"])
def test_evidence_has_distinct_facts_of_the_group_in_an_order_that_no_other_answer_has(config):
    world = make_world(config, 0)
    assert world.shape == (config.queries, config.answers, config.evidence)
    assert world.dtype == np.int32
    for query, of_query in enumerate(world):
        group = query // (config.queries // config.groups)
        per = config.facts // config.groups
        assert set(of_query.ravel()) <= set(range(group * per, (group + 1) * per))
        assert all(len(set(evidence)) == config.evidence for evidence in of_query)
        assert len({tuple(evidence) for evidence in of_query}) == config.answers
    assert len(set(world[..., 0].ravel())) > 0.5 * config.facts  # any fact may come first
    np.testing.assert_array_equal(make_world(config, 0), world)
    assert (make_world(config, 1) != world).any()


def test_a_world_with_as_many_answers_as_orders_has_them_all():
    config = SyntheticConfig(facts=6, queries=2, answers=6, evidence=2, groups=2, length=20)
    world = make_world(config, 3)
    assert {tuple(e) for e in world[0]} == set(itertools.permutations(range(3), 2))
    assert {tuple(e) for e in world[1]} == set(itertools.permutations(range(3, 6), 2))


# ---- the streams


@ALL
def test_the_evidence_lies_in_its_part_within_the_span(config):
    world, streams, planted, part = drawn(config)
    width = {"consecutive": 3, "discrete": 10}[config.placing]
    for i, stream in enumerate(streams["items"]):
        low, high = bounds(config, part[i])
        evidence = world[streams["query"][i, 0], streams["target"][i, 0]].tolist()
        assert plain.occurs(stream[low:high].tolist(), evidence, width)
        positions = planted.positions[i, -1]
        assert low <= positions.min() and positions.max() < high and np.ptp(positions) < width
        assert (np.diff(positions) > 0).all() and (stream[positions] == evidence).all()


@ALL
def test_no_other_answer_to_the_query_has_its_evidence_in_the_stream(config):
    world, streams, planted, _ = drawn(config)
    width = {"consecutive": 3, "discrete": 10}[config.placing]
    rows = zip(streams["items"].tolist(), streams["query"], streams["target"], strict=True)
    for stream, (query,), (target,) in rows:
        present = [plain.occurs(stream, evidence, width) for evidence in world[query].tolist()]
        assert np.flatnonzero(present).tolist() == [target]
    assert planted.unique.all()


@pytest.mark.parametrize("span", [1, 2, 3, 7, 41])
def test_occurrences_equal_those_of_a_plain_search(span):
    rng = np.random.default_rng(0)
    items = rng.integers(0, 5, (60, 41)).astype(np.int32)
    for length in (1, 2, 4):
        evidence = rng.integers(0, 5, (60, 7, length)).astype(np.int32)
        occurs = jax.vmap(functools.partial(source_of_evidence._occurs, span=span))
        expected = [
            [plain.occurs(x, e, span) for e in of_query]
            for x, of_query in zip(items.tolist(), evidence.tolist(), strict=True)
        ]
        np.testing.assert_array_equal(occurs(items, evidence), expected)


@BOTH
def test_places_and_background_are_uniform(config):
    # With many facts few streams are drawn twice. A second draw would favour some places.
    config = dataclasses.replace(config, facts=400, answers=2, length=40, window=0.25)
    _, streams, planted, part = drawn(config, 6000)
    span = {"consecutive": 3, "discrete": 10}[config.placing]
    positions = planted.positions[:, -1] - 20 * part[:, None]
    if config.placing == "consecutive":
        expected = np.full(20 - span + 1, 1 / (20 - span + 1))
        counts = np.bincount(positions[:, 0], minlength=len(expected))
    else:  # a fact lies at p as often as a window covers p
        over = [sum(start <= p < start + span for start in range(20 - span + 1)) for p in range(20)]
        expected = np.array(over) / (20 - span + 1) * 3 / span
        counts = np.bincount(positions.ravel(), minlength=20)
    assert len(counts) == len(expected)
    assert all(close(n, 6000, p) for n, p in zip(counts, expected, strict=True))
    is_evidence = np.zeros_like(streams["items"], bool)
    np.put_along_axis(is_evidence, planted.positions[:, -1], True, 1)
    counts = np.bincount(streams["items"][~is_evidence], minlength=400)
    assert all(close(n, counts.sum(), 1 / 400) for n in counts)


def test_distractors_are_evidence_of_other_queries_for_other_answers():
    world, streams, planted, _ = drawn(DISTRACTED, 600)
    assert all(len(set(row)) == 3 for row in planted.query)  # the last is the true one
    np.testing.assert_array_equal(planted.query[:, -1:], streams["query"])
    np.testing.assert_array_equal(planted.answer[:, -1:], streams["target"])
    assert (planted.answer[:, :-1] != streams["target"]).all()
    for stream, queries, answers, positions in zip(streams["items"], *planted[:3], strict=True):
        expected = stream.copy()
        for query, answer, at in zip(queries, answers, positions, strict=True):
            expected[at] = world[query, answer]
            assert (np.diff(at) > 0).all() and np.ptp(at) < 10
        np.testing.assert_array_equal(
            stream, expected
        )  # later evidence overwrites earlier evidence
    far = (planted.query[:, :-1] - planted.query[:, -1:]) % 4
    away = (planted.answer[:, :-1] - planted.answer[:, -1:]) % 6
    assert set(far.ravel()) == {1, 2, 3} and set(away.ravel()) == {1, 2, 3, 4, 5}
    starts = planted.positions[:, :-1, 0]
    assert starts.min() == 0 and planted.positions[:, :-1].max() == 40


def test_every_split_is_balanced_over_chains_and_parts():
    source = Synthetic(QUARTERS, train=4, valid=4, test=4)
    for split in ("train", "valid", "test"):
        assert source.size(split) == 4 * 24
        streams = source.fetch(split, np.arange(4 * 24))
        groups = source.groups(split)
        assert list(groups) == ["0-25%", "25-50%", "50-75%", "75-100%"]
        assert (np.sum(list(groups.values()), 0) == 1).all()
        for inside in groups.values():
            assert inside.shape == (4 * 24, 1)
            chain = streams["query"][inside] * 6 + streams["target"][inside]
            np.testing.assert_array_equal(np.bincount(chain, minlength=24), 1)
    assert list(Synthetic(TINY).groups("test")) == ["early", "later"]


# ---- the source


def test_a_stream_is_the_same_in_any_batch():
    world, streams, _, _ = drawn(DISTRACTED)
    some = generate(DISTRACTED, world, 0, 2, np.array([13, 5, 14], np.int32))
    assert streams.keys() == some.keys()
    for name, value in some.items():
        np.testing.assert_array_equal(value, streams[name][[13, 5, 14]])


def test_a_fetch_in_several_parts_equals_one_fetch(monkeypatch):
    monkeypatch.setattr(source_of_evidence, "_ITEMS_AT_ONCE", 7 * TINY.length)
    for name, value in Synthetic(TINY).fetch("test", np.arange(20)).items():
        np.testing.assert_array_equal(value, drawn(TINY)[1][name][:20])
    assert Synthetic(TINY).fetch("test", np.arange(0))["items"].shape == (0, TINY.length)


def test_other_splits_and_seeds_have_other_streams():
    at = np.arange(24)
    sources = [Synthetic(TINY, seed) for seed in (0, 1)]
    splits = ("train", "valid", "test")
    streams = [source.fetch(split, at)["items"] for source in sources for split in splits]
    assert len({row.tobytes() for items in streams for row in items}) == 6 * 24


def test_arrays_follow_the_schema():
    source = Synthetic(DISTRACTED)
    streams = drawn(DISTRACTED)[1]
    shapes = {"items": (600, 41), "length": (600,), "query": (600, 1), "query_mask": (600, 1)}
    shapes |= {"target": (600, 1), "example_id": (600,)}
    assert {name: value.shape for name, value in streams.items()} == shapes
    dtypes = dict.fromkeys(streams, "int32") | {"query_mask": "bool"}
    assert {name: value.dtype.name for name, value in streams.items()} == dtypes
    sizes = (source.num_items, source.max_items, source.num_queries, source.positions_at_end)
    assert sizes == (24, 41, 1, True)
    asked = source.questions
    assert (asked.query, asked.kinds) == ("kind", 4)
    assert (asked.answer, asked.classes, asked.metric) == ("class", 6, "accuracy")
    assert streams["items"].min() == 0 and streams["items"].max() == 23
    assert (streams["length"] == 41).all() and streams["query_mask"].all()
    np.testing.assert_array_equal(streams["example_id"], np.arange(600))


def test_draws_do_not_depend_on_the_default_precision():
    at = np.arange(20)
    narrow = {name: value[:20] for name, value in drawn(DISTRACTED)[1].items()}
    with jax.enable_x64(True):
        wide = Synthetic(DISTRACTED).fetch("test", at)
    for name, value in narrow.items():
        np.testing.assert_array_equal(value, wide[name])
        assert value.dtype == wide[name].dtype


def test_a_pickled_source_is_equal():
    source = Synthetic(TINY, seed=3)
    again = pickle.loads(pickle.dumps(source))
    assert again == source
    np.testing.assert_array_equal(again.world, source.world)


# ---- readers that know the world


def test_readers_give_the_answers_of_plain_python(monkeypatch):
    monkeypatch.setattr(source_of_evidence, "_ITEMS_AT_ONCE", 30 * DISCRETE.length)  # in two parts
    source, streams = Synthetic(DISCRETE, test=2), drawn(DISCRETE)[1]
    answers = source.references("test")
    asked = zip(streams["items"][:48].tolist(), streams["query"][:48], strict=True)
    for i, (stream, (query,)) in enumerate(asked):
        expected = plain.answers(source.world.tolist(), stream, query, 10)
        assert {name: int(chosen[i, 0]) for name, chosen in answers.items()} == expected
    assert all(chosen.shape == (48, 1) and chosen.dtype == np.int32 for chosen in answers.values())


@pytest.mark.parametrize("width", [1, 4, 41])
def test_most_in_window_equals_a_plain_search(width):
    world, streams, _, _ = drawn(DISCRETE)
    items = streams["items"][:12].copy()
    items[0] = 3  # a stream with a single kind of fact; the other groups have none
    most = source_of_evidence.most_in_window(DISCRETE, world, items, width)
    expected = [
        [[plain.most(x, e, width) for e in of_query] for of_query in world.tolist()]
        for x in items.tolist()
    ]
    np.testing.assert_array_equal(most, expected)


def test_what_readers_of_the_default_world_answer():
    source = Synthetic(SyntheticConfig(placing="discrete"), test=2)
    target = source.fetch("test", np.arange(2400))["target"]
    right = {name: chosen == target for name, chosen in source.references("test").items()}
    early = source.groups("test")["early"]
    assert 0.61 < right["oracle, bag of facts"].mean() < 0.72
    assert 0.95 < right["oracle, bag in a window"].mean() < 0.99
    assert right["oracle, last half only"][early].mean() < 0.06
    assert right["oracle, last half only"][~early].mean() > 0.9
    assert 0.85 < right["oracle, without the query"].mean() < 0.93


# ---- errors


WRONG = [
    *({"facts": 0}, {"facts": 401}, {"queries": 0}, {"queries": 41}, {"answers": 0}),
    *({"evidence": 0}, {"groups": 0}, {"length": 0}, {"evidence": 41}, {"answers": 10**7}),
    *({"placing": "random"}, {"parts": 3}, {"window": 0.01}, {"window": 0.6}),
    *({"edge": 0.6}, {"edge": -0.1}),
    *({"window": float("nan")}, {"window": -0.2}, {"distractors": -1}, {"distractors": 40}),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_wrong_parameter_is_named_with_the_allowed_values(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"^{name}={value!r}: must be"):
        SyntheticConfig(**wrong)


def test_conflicting_parameters_are_named():
    with pytest.raises(ValueError, match="evidence=5: must be at most 4, the facts of a part"):
        SyntheticConfig(length=8)
    with pytest.raises(ValueError, match=r"distractors=1: must be in \[0, 0\]"):
        SyntheticConfig(answers=1, distractors=1)
    with pytest.raises(ValueError, match="window=0.3: .*at most 8 facts"):
        dataclasses.replace(SyntheticConfig(length=32, window=0.25), parts=4, window=0.3)


def test_a_wrong_request_is_named_with_the_allowed_values():
    source = Synthetic(TINY, test=1)
    with pytest.raises(ValueError, match="dev.*train.*valid.*test"):
        source.size("dev")
    with pytest.raises(ValueError, match=r"\[24, -1\].*\[0, 24\)"):
        source.fetch("test", np.array([24, 1, -1]))
    with pytest.raises(ValueError, match="valid=-1"):
        Synthetic(TINY, valid=-1)


def test_a_world_whose_streams_are_full_of_evidence_is_refused():
    config = SyntheticConfig(facts=4, length=80, queries=2, answers=4, evidence=2, groups=1)
    with pytest.raises(
        ValueError, match="facts=4: .* other answers' evidence occurs in every draw"
    ):
        Synthetic(config).fetch("test", np.arange(8))
