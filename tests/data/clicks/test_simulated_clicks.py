import dataclasses
import functools

import jax
import numpy as np
import pytest

from rmjax.data.clicks.simulated import ClicksConfig, SimulatedClicks, oracle_scores, simulate
from tests.oracles import clicks as brute_force

TINY = ClicksConfig(
    clusters=9, items_per_style=3, staples=4, visit=3, clicks_min=12, clicks_max=18, targets=4
)
LONG = ClicksConfig(clicks_min=100, clicks_max=1000, zipf=1.2, staple_rate=0.4)  # lengths differ


@functools.cache
def log(config: ClicksConfig, users: int):
    return jax.device_get(simulate(config, 0, 1, np.arange(users, dtype=np.int32)))


def auc(scores, target):
    order = np.sort(scores[target == 0])
    positives = scores[target == 1]
    wins = np.searchsorted(order, positives, "left") + np.searchsorted(order, positives, "right")
    return wins.mean() / 2 / len(order)


def close(successes, trials, probability, sigmas=4.5):
    """Whether a count agrees with independent trials of this probability."""
    deviation = np.sqrt(trials * probability * (1 - probability))
    return abs(successes - trials * probability) < sigmas * deviation + 1e-9


# ---- the oracle


@pytest.mark.parametrize("last", [None, 6, 0])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"styles": 2, "drift": 0.4, "hard": 0.6},
        {"browse": 0.0, "explore": 0.0},
        {"drift": 0.0, "hard": 1.0},
    ],
    ids=str,
)
def test_the_oracle_sums_over_every_possible_user(changed, last):
    config = dataclasses.replace(TINY, **changed)
    streams, drawn = log(config, 6)
    scores = oracle_scores(config, streams, last)
    assert len(set(streams["length"])) > 1
    for user, length in enumerate(streams["length"]):
        visits = length // config.visit
        seen = range(0 if last is None else visits - last // config.visit, visits)
        visible = [
            (drawn.visit_cluster[user, v], drawn.visit_style[user, v], v < visits // 2)
            for v in seen
        ]
        positive, negative = brute_force.group_probabilities(config, visible)
        asked = drawn.query_cluster[user], drawn.query_style[user]
        with np.errstate(divide="ignore"):
            expected = np.log(positive[asked]) - np.log(negative[asked])
        np.testing.assert_allclose(scores[user], expected, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"last": 20}, {"styles": False}], ids=str)
def test_the_sigmoid_of_a_score_is_the_frequency_of_clicks(options):
    streams, _ = log(LONG, 2000)
    predicted = 1 / (1 + np.exp(-oracle_scores(LONG, streams, **options)))
    for part in np.array_split(np.argsort(predicted, axis=None), 12):
        clicked, probability = streams["target"].ravel()[part], predicted.ravel()[part].mean()
        assert close(clicked.sum(), len(part), probability)


def test_a_reader_of_the_recent_clicks_alone_is_much_worse():
    config = ClicksConfig()
    streams = SimulatedClicks(config).fetch("test", np.arange(1000))
    full, recent, clusters = (
        auc(oracle_scores(config, streams, *options), streams["target"])
        for options in [(), (20,), (None, False)]
    )
    assert 0.88 < full < 0.94
    assert full - recent >= 0.25
    assert full - clusters >= 0.05


def test_the_oracle_reads_items_length_and_query_only():
    streams, _ = log(TINY, 6)
    seen = {name: streams[name] for name in ("items", "length", "query")}
    valid = np.arange(18) < streams["length"][:, None]
    seen["items"] = np.where(valid, streams["items"], TINY.num_items - 1)
    np.testing.assert_array_equal(oracle_scores(TINY, seen), oracle_scores(TINY, streams))
    first = {name: value[:1] for name, value in seen.items()}
    expected = oracle_scores(TINY, streams)[:1]
    np.testing.assert_allclose(oracle_scores(TINY, first), expected, rtol=1e-12)
    assert oracle_scores(TINY, {name: value[:0] for name, value in seen.items()}).shape == (0, 8)


@pytest.mark.slow
def test_the_oracle_holds_for_the_longest_logs_of_a_large_world():
    world = dict(clusters=200, styles=5, items_per_style=100)
    config = ClicksConfig(**world, clicks_min=20000, clicks_max=50000)
    source = SimulatedClicks(config, test=20)
    streams = source.fetch("test", np.arange(20))
    assert streams["items"].shape == (20, 50000) and streams["items"].max() < source.num_items
    scores = oracle_scores(config, streams)
    assert np.isfinite(scores).all()
    assert auc(scores, streams["target"]) > 0.85


# ---- the source


def test_a_user_is_the_same_in_any_batch():
    source = SimulatedClicks(TINY)
    every = source.fetch("train", np.arange(20))
    some = source.fetch("train", np.array([13, 5, 14]))
    assert every.keys() == some.keys()
    for name, value in some.items():
        np.testing.assert_array_equal(value, every[name][[13, 5, 14]])


def test_a_fetch_in_several_parts_is_one_fetch(monkeypatch):
    source = SimulatedClicks(TINY)
    every = source.fetch("valid", np.arange(20))
    monkeypatch.setattr("rmjax.data.clicks.simulated._CLICKS_AT_ONCE", 3 * TINY.clicks_max)
    for name, value in source.fetch("valid", np.arange(20)).items():
        np.testing.assert_array_equal(value, every[name])
    assert source.fetch("valid", np.arange(0))["items"].shape == (0, TINY.clicks_max)


def test_other_splits_and_seeds_have_other_users():
    at = np.arange(20)
    sources, splits = [SimulatedClicks(TINY, seed) for seed in (0, 1)], ("train", "valid", "test")
    drawn = [source.fetch(split, at) for source in sources for split in splits]
    assert len({d["items"].tobytes() for d in drawn}) == 6
    other_world = SimulatedClicks(dataclasses.replace(TINY, world_seed=1)).fetch("train", at)
    assert (other_world["items"] != drawn[0]["items"]).any()
    np.testing.assert_array_equal(other_world["length"], drawn[0]["length"])


def test_arrays_follow_the_schema():
    source = SimulatedClicks(LONG, test=300)
    drawn = source.fetch("test", np.arange(300))
    shapes = {"items": (300, 1000), "length": (300,), "query": (300, 16), "query_mask": (300, 16)}
    shapes |= {"target": (300, 16), "example_id": (300,)}
    assert {k: v.shape for k, v in drawn.items()} == shapes
    dtypes = dict.fromkeys(drawn, "int32") | {"query_mask": "bool"}
    assert {k: v.dtype.name for k, v in drawn.items()} == dtypes
    assert (source.max_items, source.num_queries, source.positions_at_end) == (1000, 16, True)
    for name in ("items", "query"):
        assert drawn[name].min() >= 0 and drawn[name].max() < source.num_items
    assert drawn["query_mask"].all() and (drawn["target"] == [1, 0] * 8).all()
    np.testing.assert_array_equal(drawn["example_id"], np.arange(300))
    padding = np.arange(1000) >= drawn["length"][:, None]
    assert padding.any() and (drawn["items"][padding] == 0).all()
    assert (drawn["length"] % LONG.visit == 0).all()
    assert drawn["length"].min() >= 100 and drawn["length"].max() <= 1000


def test_draws_do_not_depend_on_the_default_precision():
    narrow = SimulatedClicks(TINY).fetch("test", np.arange(20))
    with jax.enable_x64(True):
        wide = SimulatedClicks(TINY).fetch("test", np.arange(20))
    for name, value in narrow.items():
        np.testing.assert_array_equal(value, wide[name])
        assert value.dtype == wide[name].dtype


def test_lengths_are_log_uniform():
    length = log(LONG, 2000)[0]["length"]
    assert close((length < 10**2.5).sum(), len(length), 0.5)


# ---- the users


def test_users_have_three_to_eight_distinct_interests():
    _, drawn = log(LONG, 2000)
    np.testing.assert_array_equal(drawn.lives.sum(1), drawn.interests)
    for m, lives in brute_force.EARLY_BOTH_LATE.items():
        assert (drawn.lives[drawn.interests == m] == lives).all()
        assert close((drawn.interests == m).sum(), 2000, 1 / 6)
    assert all(len(set(row)) == 8 for row in drawn.cluster)


def test_an_interest_is_visited_in_the_halves_of_its_life_only():
    streams, drawn = log(LONG, 2000)
    visits = streams["length"][:, None] // LONG.visit
    at = np.arange(drawn.visit_interest.shape[1])
    early, both, _ = (n[:, None] for n in drawn.lives.T)
    slot, interest = drawn.visit_interest, drawn.visit_interest < drawn.interests[:, None]
    first, second = (at < visits // 2) & interest, (at >= visits // 2) & (at < visits) & interest
    assert (slot < early + both)[first].all() and (slot >= early)[second].all()
    real = at < visits
    assert close((~interest)[real].sum(), real.sum(), LONG.browse)
    browsed = (drawn.visit_cluster[:, :, None] == drawn.cluster[:, None]) & (slot < 8)[..., None]
    mine = np.arange(8) < drawn.interests[:, None]
    assert not (browsed & mine[:, None])[~interest].any()


def test_styles_drift_between_the_visits_of_an_interest():
    streams, drawn = log(LONG, 2000)
    stays = changes = 0
    for user in range(300):
        for slot in range(drawn.interests[user]):
            visits = drawn.visit_interest[user, : streams["length"][user] // LONG.visit] == slot
            style = drawn.visit_style[user, : len(visits)][visits]
            stays += (style[1:] == style[:-1]).sum()
            changes += (style[1:] != style[:-1]).sum()
            assert len(style) == 0 or style[-1] == drawn.style[user, slot]
    assert close(changes, stays + changes, LONG.drift)


def test_clicks_are_staples_or_of_the_visit_by_zipf():
    streams, drawn = log(LONG, 2000)
    first_staple = LONG.num_items - LONG.staples
    ids = np.asarray(jax.random.permutation(jax.random.key(LONG.world_seed), LONG.num_items))
    items = np.argsort(ids)[streams["items"]].reshape(2000, -1, LONG.visit)
    real = np.arange(items.shape[1]) < streams["length"][:, None] // LONG.visit
    items, cluster, style = items[real], drawn.visit_cluster[real], drawn.visit_style[real]
    staple = items >= first_staple
    assert not staple[:, 0].any()
    assert close(staple[:, 1:].sum(), staple[:, 1:].size, LONG.staple_rate)
    group = np.broadcast_to((cluster * LONG.styles + style)[:, None], items.shape)
    np.testing.assert_array_equal(items[~staple] // LONG.items_per_style, group[~staple])
    topical, staples = items[~staple] % LONG.items_per_style, items[staple] - first_staple
    for ranks, many in ((topical, 20), (staples, 80)):
        weight = np.arange(1, many + 1) ** -1.2
        for rank in (0, 1, 7, many - 1):
            assert close((ranks == rank).sum(), len(ranks), weight[rank] / weight.sum())


def test_half_of_the_unexplored_positives_need_the_first_half():
    streams, drawn = log(LONG, 2000)
    asked = drawn.target_interest >= 0
    assert close((~asked).sum(), asked.size, LONG.explore)
    early = asked & (drawn.target_interest < drawn.lives[:, :1])
    assert close(early.sum(), asked.sum(), 0.5)
    at = np.arange(drawn.visit_interest.shape[1])
    visits = streams["length"][:, None] // LONG.visit
    second = (at >= visits // 2) & (at < visits)
    visited = (drawn.visit_interest[:, None] == drawn.target_interest[..., None]) & second[:, None]
    assert not visited.any(-1)[early].any()
    cluster = np.take_along_axis(drawn.cluster, drawn.target_interest, 1)
    np.testing.assert_array_equal(cluster[asked], drawn.query_cluster[:, ::2][asked])
    style = np.take_along_axis(drawn.style, drawn.target_interest, 1)
    assert close((style != drawn.query_style[:, ::2])[asked].sum(), asked.sum(), LONG.drift)


def test_a_negative_is_as_popular_as_its_positive_and_of_another_group():
    streams, drawn = log(LONG, 2000)
    of_queries = drawn.query_cluster, drawn.query_style, drawn.query_rank
    cluster, style, rank = (values.reshape(2000, -1, 2) for values in of_queries)
    np.testing.assert_array_equal(rank[..., 0], rank[..., 1])
    hard = cluster[..., 0] == cluster[..., 1]
    assert (style[..., 0] != style[..., 1])[hard].all()
    assert close(hard.sum(), hard.size, LONG.hard)
    assert (streams["query"][:, ::2] != streams["query"][:, 1::2]).all()
    weight = np.arange(1, 21) ** -1.2
    assert close((rank[..., 0] == 0).sum(), hard.size, weight[0] / weight.sum())


def test_users_without_labels_keep_their_streams():
    """A share of the training users is asked; their streams and questions stay as they are."""
    everyone = SimulatedClicks(TINY, train=900, valid=30)
    users, asked = np.arange(900), {}
    full = everyone.fetch("train", users)
    for share in (0.2, 0.5):
        some = SimulatedClicks(TINY, train=900, valid=30, labelled=share)
        drawn = some.fetch("train", users)
        asked[share] = drawn["query_mask"].any(1)
        assert close(asked[share].sum(), 900, share)
        for name, values in full.items():
            kept = asked[share] if name in ("query", "query_mask", "target") else users
            np.testing.assert_array_equal(drawn[name][kept], values[kept])
            assert drawn[name].dtype == values.dtype
        assert not drawn["query"][~asked[share]].any() and not drawn["target"][~asked[share]].any()
        one = some.fetch("train", np.array([7]))  # a user depends on the index alone
        np.testing.assert_array_equal(one["query_mask"][0], drawn["query_mask"][7])
        assert some.fetch("valid", users[:30])["query_mask"].all()
    assert (asked[0.2] <= asked[0.5]).all()
    with pytest.raises(ValueError, match=r"labelled=1.5: must be in \[0, 1\]"):
        SimulatedClicks(TINY, labelled=1.5)


# ---- errors


@pytest.mark.parametrize(
    "wrong",
    [
        {"clusters": 8}, {"styles": 1}, {"items_per_style": 0}, {"staples": 0}, {"visit": 0},
        {"targets": 0}, {"zipf": -1.0}, {"browse": 1.5}, {"drift": -0.1}, {"staple_rate": 2.0},
        {"explore": float("nan")}, {"hard": -1.0}, {"clicks_min": 10}, {"clicks_min": 995},
        {"clicks_max": 1005}, {"clicks_max": 900},
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_parameter_is_named_with_what_is_allowed(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"{name}={value!r}: must be"):
        ClicksConfig(**wrong)


def test_a_wrong_request_is_named_with_what_is_allowed():
    source = SimulatedClicks(TINY, test=5)
    with pytest.raises(ValueError, match="dev.*train.*valid.*test"):
        source.size("dev")
    with pytest.raises(ValueError, match=r"\[5, -1\].*\[0, 5\)"):
        source.fetch("test", np.array([5, 1, -1]))
    with pytest.raises(ValueError, match="valid=-1"):
        SimulatedClicks(TINY, valid=-1)
    with pytest.raises(ValueError, match="last=4: .*multiple of visit=3"):
        oracle_scores(TINY, source.fetch("test", np.arange(1)), last=4)
