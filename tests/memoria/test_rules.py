"""Single rules: ties, draws, lifespans, capacities, distances, contributions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax import memoria
from rmjax.memoria import MemoriaConfig
from tests.memoria.runs import at, run, serials, small, stream


def filled(config, steps, seed=0, grid=None):
    """Returns the state after some random steps, in which all engrams contribute equally."""
    xs = stream(config, steps, seed, grid)
    return at(run(config, xs | {"weights": np.ones_like(xs["weights"])}).after, -1)


def test_distances_of_wide_engrams_do_not_underflow():
    config = MemoriaConfig(
        working=4, short_term_capacity=40, remind_short_term=10, remind_long_term=0, dim=768
    )
    rng = np.random.default_rng(0)
    old = 0.3 * rng.normal(size=(10, 4, 768)).astype(np.float32)
    state = memoria.init(config)
    for working in old:
        state, reminded = memoria.remind(config, state, working, jax.random.key(0))
        state = memoria.memorize_and_forget(config, state, reminded, jnp.ones(10))
    working = 0.3 * rng.normal(size=(4, 768)).astype(np.float32)
    _, reminded = memoria.remind(config, state, working, jax.random.key(0))
    living = np.asarray(state.serial)[np.asarray(state.serial) >= 0]
    squares = ((old.reshape(40, 1, 768)[living].astype(np.float64) - working) ** 2).sum(-1)
    assert (np.exp(-squares.astype(np.float32)) == 0).all(), (
        "the plain sum of exp(-d^2) is 0 everywhere"
    )
    best = living[np.argsort(-np.logaddexp.reduce(-squares, 1))[:10]]
    assert serials(jax.tree.map(np.asarray, reminded.short_term)) == best.tolist()


def test_the_two_correlations_can_disagree():
    config = {"working": 2, "remind_short_term": 1, "remind_long_term": 0, "dim": 1, "ties": "hash"}
    # The first old engram equals a new one; the second is nearer to both new ones on average.
    old = jnp.array([[0.0], [1.0]])
    new = jnp.array([[0.0], [2.5]])
    nearest = {}
    for correlation in ("exp", "negative_square"):
        c = MemoriaConfig(correlation=correlation, **config)
        state, reminded = memoria.remind(c, memoria.init(c), old)
        state = memoria.memorize_and_forget(c, state, reminded, jnp.ones(1))
        nearest[correlation] = int(memoria.remind(c, state, new)[1].short_term.serials[0])
    assert nearest == {"exp": 0, "negative_square": 1}


@pytest.mark.parametrize("search_seeds, chosen", [("reminded", 4), ("all_short_term", 6)])
@pytest.mark.parametrize("ties", ["random", "hash"])
def test_edges_that_tie_are_taken_equally_often(ties, search_seeds, chosen):
    config = small(
        ties=ties,
        search_seeds=search_seeds,
        search_depth=0,
        lifespan_extend=6.0,
        remind_short_term=4,
    )
    state = filled(config, 30)
    state = state.replace(counts=jnp.zeros_like(state.counts))  # no edge is stronger than any other
    number = int((state.kind == memoria.LONG_TERM).sum())
    assert number >= 6 and (state.kind == memoria.SHORT_TERM).sum() == 6
    draws = 3000

    @jax.vmap
    def seeds(key, step):
        later = state.replace(next_serial=state.next_serial + config.working * step)
        return memoria.remind(config, later, jnp.zeros((3, 2)), key)[1].seeds

    drawn = np.asarray(seeds(jax.random.split(jax.random.key(1), draws), jnp.arange(draws)))
    share = drawn.mean(0)[state.kind == memoria.LONG_TERM]
    expected = 1 - (1 - 1 / number) ** chosen
    np.testing.assert_allclose(share, expected, atol=5 * np.sqrt(expected * (1 - expected) / draws))


@pytest.mark.parametrize("increment", ["paper", "released", "given"])
def test_weights_that_are_zero_add_nothing_and_invalid_ones_are_ignored(increment):
    config = small(lifespan_increment=increment)
    before, reminded = memoria.remind(config, filled(config, 2), jnp.zeros((3, 2)))
    assert reminded.valid.any() and not reminded.valid.all()
    for rest in (0.0, jnp.nan, jnp.inf):
        after = memoria.memorize_and_forget(
            config, before, reminded, jnp.where(reminded.valid, 0.0, rest)
        )
        lives = np.asarray(after.kind) != memoria.EMPTY
        np.testing.assert_array_equal(after.lifespan[lives], before.lifespan[lives] - 1)
        assert np.isfinite(after.lifespan).all()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf, -1.0])
@pytest.mark.parametrize("increment", ["paper", "released"])
def test_negative_and_infinite_weights_count_as_zero(increment, bad):
    config = small(lifespan_increment=increment)
    before, reminded = memoria.remind(config, filled(config, 12), jnp.zeros((3, 2)))
    assert reminded.valid.all()
    weights = jnp.array([0.1, 0.2, 0.3, 0.1, 0.1])
    after = [
        memoria.memorize_and_forget(config, before, reminded, weights.at[1].set(w))
        for w in (bad, 0.0)
    ]
    np.testing.assert_array_equal(after[0].lifespan, after[1].lifespan)


def test_only_the_ratio_of_weights_counts():
    config = small()
    before, reminded = memoria.remind(config, filled(config, 12), jnp.zeros((3, 2)))
    weights = jnp.array([0.0, 2.0, 1.0, 0.5, 3.0])
    lifespans = [
        memoria.memorize_and_forget(config, before, reminded, weights * scale).lifespan
        for scale in (1.0, 1e30, 1e-30)
    ]
    for lifespan in lifespans[1:]:
        np.testing.assert_allclose(lifespan, lifespans[0], rtol=1e-5)


@pytest.mark.parametrize("correlation", ["exp", "negative_square"])
def test_a_common_offset_of_all_engrams_does_not_matter(correlation):
    config = small(
        correlation=correlation, dim=64, working=4, short_term_capacity=40, remind_short_term=8
    )
    rng = np.random.default_rng(0)
    xs = stream(config, 11, 0, grid=None) | {"working": 0.1 * rng.normal(size=(11, 4, 64))}
    offset = 300.0 * rng.normal(size=64)  # squared, 5,000,000 times the distance of two engrams
    offset = np.round(offset * 2**6) / 2**6
    xs["working"] = np.round(xs["working"] * 2**6) / 2**6  # so that adding it is exact
    near = run(config, xs | {"working": xs["working"].astype(np.float32)})
    far = run(config, xs | {"working": (xs["working"] + offset).astype(np.float32)})
    for t in range(11):
        assert serials(at(near.reminded, t).short_term) == serials(at(far.reminded, t).short_term)


def test_lifespan_is_shared_out_as_section_3_4_says():
    config = small(lifespan_extend=3.0, initial_lifespan=9.0)
    before, reminded = memoria.remind(config, filled(config, 12), jnp.zeros((3, 2)))
    weights = jnp.array([1.0, 3.0, 0.0, 4.0, 2.0])
    gain = np.where(reminded.valid, weights, 0)
    gain = gain / gain.sum() * int(reminded.valid.sum()) * 3.0
    after = memoria.memorize_and_forget(config, before, reminded, weights)
    slots = np.concatenate([reminded.short_term.slots, reminded.long_term.slots])
    for slot, more, valid in zip(slots, gain, reminded.valid, strict=True):
        if valid:
            assert after.lifespan[slot] == pytest.approx(float(before.lifespan[slot]) + more - 1)
    released = MemoriaConfig(**vars(config) | {"lifespan_increment": "released"})
    after = memoria.memorize_and_forget(released, before, reminded, weights)
    number = int(reminded.valid.sum()) + 1  # a short-term engram is not reminded
    assert after.lifespan[slots[0]] == pytest.approx(
        float(before.lifespan[slots[0]]) + 1.0 * number * 3 - 1
    )


def test_an_engram_with_a_lifespan_of_nan_is_forgotten():
    config = small(lifespan_increment="given")
    before, reminded = memoria.remind(config, filled(config, 5), jnp.zeros((3, 2)))
    weights = jnp.array([jnp.nan, 1.0, 1.0, 1.0, 1.0])
    after = memoria.memorize_and_forget(config, before, reminded, weights)
    assert after.kind[reminded.short_term.slots[0]] == memoria.EMPTY
    assert np.isfinite(after.lifespan).all()


@pytest.mark.parametrize("order, long_term", [("paper", []), ("released", [0])])
def test_dying_engrams_push_others_out_of_short_term_memory_only_in_the_released_order(
    order, long_term
):
    config = small(
        order=order,
        working=2,
        short_term_capacity=3,
        remind_short_term=1,
        remind_long_term=0,
        initial_lifespan=2.0,
        lifespan_increment="given",
    )
    first = jnp.array([[0.0, 0.0], [9.0, 9.0]])
    state, reminded = memoria.remind(config, memoria.init(config), first)
    state = memoria.memorize_and_forget(config, state, reminded, jnp.zeros(1))
    # Engram 0 is reminded and gains lifespan; engram 1 dies.
    state, reminded = memoria.remind(config, state, jnp.zeros((2, 2)))
    state = memoria.memorize_and_forget(config, state, reminded, jnp.full(1, 5.0))
    assert state.serial[state.kind == memoria.LONG_TERM].tolist() == long_term
    short_term = sorted(state.serial[state.kind == memoria.SHORT_TERM].tolist())
    assert short_term == [0, 2, 3][len(long_term) :]


def test_long_term_engrams_never_return_to_short_term_memory():
    config = small(
        working=2,
        short_term_capacity=3,
        remind_long_term=0,
        lifespan_increment="given",
        initial_lifespan=2.0,
    )
    state = memoria.init(config)
    for weight, long_term in [
        (0.0, []),
        (5.0, [0]),
        (-10.0, [0]),
    ]:  # at last engrams 1, 2 and 3 die
        state, reminded = memoria.remind(config, state, jnp.zeros((2, 2)))
        state = memoria.memorize_and_forget(config, state, reminded, jnp.full(2, weight))
        assert state.serial[state.kind == memoria.LONG_TERM].tolist() == long_term
    assert sorted(state.serial[state.kind == memoria.SHORT_TERM].tolist()) == [4, 5]


def test_a_full_long_term_memory_evicts_the_engram_with_the_least_lifespan():
    config = small(
        long_term_capacity=2,
        short_term_capacity=0,
        initial_lifespan=9.0,
        remind_short_term=0,
        remind_long_term=3,
    )
    config = MemoriaConfig(**vars(config) | {"lifespan_increment": "given", "search_seeds": "full"})
    state = memoria.init(config)
    state, reminded = memoria.remind(config, state, jnp.zeros((3, 2)))
    state = memoria.memorize_and_forget(config, state, reminded, jnp.zeros(3))
    assert sorted(state.serial[state.serial >= 0].tolist()) == [1, 2] and state.evicted == 1
    state, reminded = memoria.remind(config, state, jnp.ones((3, 2)))
    helped = np.asarray(reminded.long_term.serials) == 1
    state = memoria.memorize_and_forget(config, state, reminded, jnp.where(helped, 5.0, 0.0))
    assert sorted(state.serial[state.serial >= 0].tolist()) == [1, 5] and state.evicted == 4


@pytest.mark.parametrize("sizes", [(0, 0), (0, 3), (2, 0)])
def test_the_numbers_of_reminded_engrams_may_be_zero(sizes):
    config = small(remind_short_term=sizes[0], remind_long_term=sizes[1], initial_lifespan=6.0)
    steps = run(config, stream(config, 12))
    assert steps.reminded.short_term.slots.shape[1:] == (sizes[0],)
    assert steps.reminded.long_term.engrams.shape[1:] == (sizes[1], 2)
    # Without a reminded short-term engram the search meets nothing.
    assert not steps.reminded.long_term.valid.any()
    assert (at(steps.after, -1).kind == memoria.LONG_TERM).any()


def test_more_may_be_asked_for_than_there_are_slots():
    config = small(remind_short_term=40, remind_long_term=50, long_term_capacity=4)
    steps = run(config, stream(config, 12))
    assert steps.reminded.short_term.valid.sum(-1).max() == 6
    assert steps.reminded.long_term.slots.shape == (12, 50)


def test_the_default_capacity():
    # 1.25 x 8 x (50 + 50) + 50
    assert MemoriaConfig().long_term == 1050 and MemoriaConfig().capacity == 1500
    assert MemoriaConfig(max_segments=10).long_term == 500
    assert MemoriaConfig(long_term_capacity=7).capacity == 457
    # If lifespans outlast short-term memory, engrams that are never reminded need room too.
    unreminded = small(lifespan_extend=0.0, initial_lifespan=8.0)
    xs = stream(unreminded, 60)
    steps = run(unreminded, xs)
    assert (steps.after.kind[-1] == memoria.LONG_TERM).sum() == 15
    assert steps.after.evicted[-1] == 0


def test_contributions_average_what_is_not_masked():
    attention = jnp.arange(24.0).reshape(2, 3, 2, 2)
    assert memoria.contribution(attention).tolist() == [11.0, 12.0]
    assert memoria.contribution(attention, jnp.array([True, False])).tolist() == [10.0, 11.0]
    assert memoria.contribution(attention, jnp.array([False, False])).tolist() == [0.0, 0.0]


def test_exploit_attends_to_reminded_engrams_only():
    config = small()
    empty = memoria.remind(config, memoria.init(config), jnp.ones((3, 2)))[1]
    read, weights = memoria.exploit(jnp.ones((4, 2)), empty)
    assert (read == 0).all() and (weights == 0).all()
    none = small(remind_short_term=0, remind_long_term=0, long_term_capacity=20)
    read, weights = memoria.exploit(
        jnp.ones((4, 2)), memoria.remind(none, memoria.init(none), jnp.ones((3, 2)))[1]
    )
    assert (read == 0).all() and read.shape == (4, 2) and weights.shape == (0,)
    reminded = memoria.remind(config, filled(config, 3), jnp.zeros((3, 2)))[1]
    read, weights = memoria.exploit(jnp.ones((4, 2)), reminded)
    scores = np.asarray(reminded.engrams)[np.asarray(reminded.valid)].sum(-1) / np.sqrt(2)
    expected = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(weights[reminded.valid], expected, rtol=1e-5)
    np.testing.assert_allclose(
        read[0], expected @ np.asarray(reminded.engrams)[np.asarray(reminded.valid)], rtol=1e-5
    )
