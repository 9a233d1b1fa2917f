"""Laws of the memory as a pure function.

Streams are independent, inactive steps change nothing, and slots do not matter.
"""

from __future__ import annotations

import functools
import sys

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax import memoria
from rmjax.io import cost
from tests.memoria.runs import alive, at, given, run, serials, small, stream

same = chex.assert_trees_all_equal
# On a grid this correlation is exact in f32, for any order of summation.
EXACT = {"correlation": "negative_square"}
CONFIGS = {
    "paper": small(**EXACT),
    "released": small(
        search_seeds="all_short_term", ties="random", order="released", lifespan_extend=4.0, **EXACT
    ),
    "exp": small(),
}
STEPS = 40


@pytest.fixture(params=CONFIGS, scope="module")
def config(request):
    return CONFIGS[request.param]


def streams(config, batch=3):
    """Returns inputs [T, B, ...]; the inactive steps lie at different places in each stream."""
    rows = [
        stream(config, STEPS, seed, grid=None if config.correlation == "exp" else 0.5)
        for seed in range(batch)
    ]
    xs = jax.tree.map(lambda *x: jnp.stack(x, 1), *rows)
    rng = np.random.default_rng(0)
    return xs | {"active": jnp.asarray(rng.random((STEPS, batch)) < 0.8)}


@functools.partial(jax.jit, static_argnums=0)
def run_batch(config, state, xs):
    def one(state, x):
        remind = jax.vmap(functools.partial(memoria.remind, config))
        memorize = jax.vmap(functools.partial(memoria.memorize_and_forget, config))
        state, reminded = remind(state, x["working"], x["key"], x["active"])
        return memorize(state, reminded, x["weights"], x["active"]), (reminded, state)

    return jax.lax.scan(one, state, xs)


def empty(config, batch=3):
    return memoria.fork(memoria.init(config), batch)


def rows(tree, index, axis=0):
    return jax.tree.map(lambda x: jnp.take(x, index, axis), tree)


# One stream and many streams; scan, loop and jit.


def test_vmap_over_streams_equals_one_stream_at_a_time(config):
    xs = streams(config)
    state, (reminded, _) = run_batch(config, empty(config), xs)
    for row in range(3):
        steps = run(config, at(xs, slice(None), row))
        if config.correlation == "negative_square":
            same(at(steps.after, -1), rows(state, row))
        for t in range(STEPS):
            one, batch = at(steps.reminded, t), at(reminded, t, row)
            assert serials(one.short_term) == serials(batch.short_term)
            assert serials(one.long_term) == serials(batch.long_term)


def test_a_scan_equals_a_loop(config):
    xs = at(streams(config), slice(None), 0)
    remind = jax.jit(functools.partial(memoria.remind, config))
    memorize = jax.jit(functools.partial(memoria.memorize_and_forget, config))
    state, steps = memoria.init(config), run(config, xs)
    for t in range(STEPS):
        x = at(xs, t)
        state, reminded = remind(state, x["working"], x["key"], x["active"])
        same(state, at(steps.reminding, t))
        state = memorize(state, reminded, x["weights"], x["active"])
    if config.correlation == "negative_square":
        same(state, at(steps.after, -1))
    assert remind._cache_size() == 1 and memorize._cache_size() == 1, "compiled twice"


def test_results_without_jit_are_the_same():
    config = CONFIGS["paper"]
    xs = at(stream(config, 12), slice(None))
    state = memoria.init(config)
    for t in range(12):
        x = at(xs, t)
        state, reminded = memoria.remind(config, state, x["working"])
        state = memoria.memorize_and_forget(config, state, reminded, x["weights"])
    same(state, at(run(config, xs).after, -1))


def test_streams_are_independent(config):
    xs = streams(config)
    state, _ = run_batch(config, empty(config), xs)
    order = jnp.array([2, 0, 1])
    same(run_batch(config, empty(config), rows(xs, order, 1))[0], rows(state, order))
    other = jax.tree.map(
        lambda x, y: x.at[:, 1:].set(y[:, 1:]),
        xs,
        streams(config) | {"working": 9 * xs["working"] + 1},
    )
    other["working"] = other["working"].at[:, 2].set(jnp.nan)
    same(rows(run_batch(config, empty(config), other)[0], 0), rows(state, 0))


def test_inactive_steps_change_nothing_whatever_they_hold(config):
    xs = streams(config)
    state, _ = run_batch(config, empty(config), xs)
    garbage = {"working": jnp.nan, "weights": jnp.nan}
    off = xs | {"active": jnp.zeros_like(xs["active"])}
    off |= {name: jnp.full_like(xs[name], value) for name, value in garbage.items()}
    later, (reminded, reminding) = run_batch(config, state, off)
    same(later, state)
    same(at(reminding, 0), state)
    assert not reminded.valid.any() and not reminded.found.any() and not reminded.seeds.any()
    assert (reminded.short_term.serials == -1).all() and (reminded.engrams == 0).all()


def test_inactive_steps_can_be_left_out():
    config = CONFIGS["paper"]
    xs = at(streams(config), slice(None), 0)
    kept = at(xs, xs["active"])
    same(at(run(config, xs).after, -1), at(run(config, kept).after, -1))


# Slots and capacities do not matter.


def test_a_larger_capacity_changes_nothing_without_eviction(config):
    xs = at(streams(config), slice(None), 0)
    steps = run(config, xs)
    larger = run(
        memoria.MemoriaConfig(**vars(config) | {"long_term_capacity": config.long_term + 17}), xs
    )
    assert steps.after.evicted[-1] == 0
    for t in range(STEPS):
        for part in ("short_term", "long_term"):
            assert serials(getattr(at(steps.reminded, t), part)) == serials(
                getattr(at(larger.reminded, t), part)
            )
    one, other = at(steps.after, -1), at(larger.after, -1)
    counts = [
        np.asarray(memoria.cofire_counts(s))[np.ix_(alive(s), alive(s))] for s in (one, other)
    ]
    same(*counts)
    same(one.lifespan[alive(one)], other.lifespan[alive(other)])


def test_reminding_again_replaces_the_working_engrams():
    config, xs = CONFIGS["paper"], stream(CONFIGS["paper"], 13)
    state = at(run(config, at(xs, slice(12))).after, -1)
    wrong, _ = memoria.remind(config, state, xs["working"][12] + 5)
    again, reminded = memoria.remind(config, wrong, xs["working"][12])
    once, expected = memoria.remind(config, state, xs["working"][12])
    same((again, reminded), (once, expected))


def test_ties_go_to_the_oldest_engram_in_any_slot():
    config = small(working=2, remind_short_term=3, remind_long_term=3, lifespan_extend=4.0, **EXACT)
    xs = stream(config, 40) | {"working": np.zeros((40, 2, 2), np.float32)}  # all engrams are equal
    steps = run(config, xs)
    assert (np.diff(at(steps.after, -1).by_birth) < 0).any(), (
        "the case needs slots out of the order of birth"
    )
    for t in range(1, 40):
        state, reminded = at(steps.reminding, t), at(steps.reminded, t)
        short = np.sort(state.serial[state.kind == memoria.SHORT_TERM])
        assert serials(reminded.short_term) == short[:3].tolist()
        assert serials(reminded.long_term) == np.sort(state.serial[reminded.found])[:3].tolist()


# The invariants of a state.


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.integers(0, 2**31), st.sampled_from(sorted(CONFIGS)))
def test_a_state_is_sound(seed, name):
    config = CONFIGS[name]
    xs = stream(config, STEPS, seed) | {"active": np.random.default_rng(seed).random(STEPS) < 0.9}
    steps = run(config, xs)
    before = memoria.init(config)
    for t in range(STEPS):
        sound(at(steps.reminding, t), config, working=bool(xs["active"][t]))
        sound(at(steps.after, t), config, working=False)
        if xs["active"][t]:
            falls_by_one(at(steps.reminding, t), at(steps.reminded, t), at(steps.after, t))
        else:
            same(at(steps.after, t), before)
        before = at(steps.after, t)


def sound(state, config, working):
    lives = state.kind != memoria.EMPTY
    assert ((state.serial >= 0) == lives).all(), "a slot is free or alive, never both"
    assert len(set(state.serial[lives])) == lives.sum() and (state.serial < state.next_serial).all()
    assert (state.lifespan[lives] > 0).all()
    assert (state.lifespan[~lives] == 0).all() and (state.age[~lives] == 0).all()
    assert sorted(state.by_birth) == list(range(config.capacity))
    assert (state.by_birth[: lives.sum()] == alive(state)).all()
    assert (np.diff(state.kind[alive(state)]) <= 0).all(), (
        "long-term before short-term before working"
    )
    numbers = [
        (state.kind == kind).sum()
        for kind in (memoria.WORKING, memoria.SHORT_TERM, memoria.LONG_TERM)
    ]
    assert numbers[0] == config.working * working
    assert numbers[1] <= config.short_term_capacity and numbers[2] <= config.long_term
    counts = np.asarray(memoria.cofire_counts(state))
    assert (counts == counts.T).all() and (counts >= 0).all()
    assert (counts[~lives] == 0).all() and (counts <= counts.diagonal()[:, None]).all()


def falls_by_one(before, reminded, after):
    spared = np.ones(before.kind.shape, bool)
    for part in (reminded.short_term, reminded.long_term):
        spared[part.slots[part.valid]] = False
    survives = (after.serial == before.serial) & (after.serial >= 0)
    assert (after.lifespan[spared & survives] == before.lifespan[spared & survives] - 1).all()
    dead = (before.serial >= 0) & ~survives & spared
    assert (before.lifespan[dead] <= 1).all() or after.evicted > before.evicted


# Shapes, sizes, gradients.


def test_shapes_and_dtypes_never_change(config):
    shapes = jax.eval_shape(lambda: memoria.init(config))
    xs = at(stream(config, 1), 0)
    state, reminded = jax.eval_shape(
        functools.partial(memoria.remind, config), shapes, xs["working"], xs["key"]
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(state, shapes)
    after = jax.eval_shape(
        functools.partial(memoria.memorize_and_forget, config), state, reminded, xs["weights"]
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(after, shapes)
    assert cost.tree_bytes(shapes) == cost.tree_bytes(memoria.init(config))
    with jax.enable_x64(True):
        xs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if x.dtype == np.float32 else x, xs)
        step = functools.partial(
            memoria.step, config, exploit=lambda reminded: (None, jnp.asarray(xs["weights"]))
        )
        after, _, _ = jax.eval_shape(step, shapes, xs["working"], key=xs["key"])
    chex.assert_trees_all_equal_shapes_and_dtypes(after, shapes)


@pytest.mark.parametrize("search_seeds", ["reminded", "all_short_term"])
def test_a_donated_state_is_changed_in_place(search_seeds):
    config = small(long_term_capacity=1500, search_seeds=search_seeds, dim=64)
    shapes = jax.eval_shape(lambda: memoria.fork(memoria.init(config), 2))

    def step(state, x):
        state, reminded = jax.vmap(functools.partial(memoria.remind, config))(state, x["working"])
        return jax.vmap(functools.partial(memoria.memorize_and_forget, config))(
            state, reminded, x["weights"]
        ), None

    xs = {"working": jnp.zeros((3, 2, 3, 64)), "weights": jnp.zeros((3, 2, 5))}
    for function, x in [(step, at(xs, 0)), (functools.partial(jax.lax.scan, step), xs)]:
        memory = jax.jit(function, donate_argnums=0).lower(shapes, x).compile().memory_analysis()
        assert memory.alias_size_in_bytes >= cost.tree_bytes(shapes)
        assert memory.temp_size_in_bytes < 0.25 * cost.tree_bytes(shapes.counts), (
            "the matrix was copied"
        )


def test_gradients_stop_at_the_memory_and_flow_through_what_reads_it(config):
    xs = stream(config, 8, 3, grid=None)

    @jax.jit
    def loss(working, queries):
        def one(state, x):
            def look(reminded):
                read, weights = memoria.exploit(queries, reminded)
                return (read**2).sum(), weights

            return memoria.step(config, state, x[0], look, x[1])[:2]

        return jax.lax.scan(one, memoria.init(config), (working, xs["key"]))[1].sum()

    to_working, to_queries = jax.grad(loss, (0, 1))(
        jnp.asarray(xs["working"]), jnp.ones((4, config.dim))
    )
    assert (to_working == 0).all()
    assert jnp.isfinite(to_queries).all() and (to_queries != 0).any()


def test_the_number_of_rows_searched_together_does_not_matter(monkeypatch):
    config = small(
        search_seeds="all_short_term",
        remind_short_term=4,
        short_term_capacity=15,
        lifespan_extend=6.0,
    )
    xs, runs = stream(config, 40, grid=None), []
    for rows_at_once in (1, 3, 16):
        monkeypatch.setattr(sys.modules["rmjax.memoria._remind"], "SEARCH_ROWS", rows_at_once)
        jax.clear_caches()
        runs.append(run(config, xs))
    assert runs[0].reminded.found.sum(-1).max() > 16
    same(*runs)


def test_distances_use_the_highest_precision():
    for correlation, dots in {"exp": 2, "negative_square": 0}.items():
        config = small(correlation=correlation)
        arguments = jax.eval_shape(lambda: (memoria.init(config), jnp.zeros((3, 2))))  # noqa: B023
        lowered = memoria.remind.lower(config, *arguments).as_text()
        assert (
            lowered.count("dot_general") == lowered.count("precision = [HIGHEST, HIGHEST]") == dots
        )


def test_reset_empties_some_streams_and_leaves_the_others(config):
    xs = streams(config)
    state, _ = run_batch(config, empty(config), xs)
    reset = jax.jit(memoria.reset)(state, jnp.array([True, False, True]))
    same(rows(reset, 1), rows(state, 1))
    assert (memoria.cofire_counts(rows(reset, 0)) == 0).all()
    fresh, (reminded, _) = run_batch(config, empty(config), xs)
    again, (repeated, _) = run_batch(config, reset, xs)
    names = [name for name in vars(fresh) if name not in ("engrams", "counts")]
    same(*({name: getattr(s, name)[::2] for name in names} for s in (fresh, again)))
    same(memoria.cofire_counts(fresh)[::2], memoria.cofire_counts(again)[::2])
    same(rows(reminded, jnp.array([0, 2]), 1), rows(repeated, jnp.array([0, 2]), 1))
    one = memoria.reset(rows(state, 0), True)
    assert one.next_serial == 0 and (one.kind == memoria.EMPTY).all()


def test_a_fork_has_buffers_of_its_own():
    state = memoria.init(CONFIGS["paper"])
    copy = memoria.fork(state)
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    same(copy, memoria.init(CONFIGS["paper"]))
    three = memoria.fork(copy, 3)
    same(rows(three, 2), copy)
    assert three.counts.shape == (3, *copy.counts.shape)


def test_a_step_is_its_three_stages(config):
    xs = at(stream(config, 1), 0)
    state = at(run(config, stream(config, 9)).after, -1)
    reminding, reminded = memoria.remind(config, state, xs["working"], xs["key"])
    expected = memoria.memorize_and_forget(config, reminding, reminded, xs["weights"])
    after, result, record = memoria.step(
        config, state, xs["working"], lambda r: (r, given(r, xs)), xs["key"]
    )
    same(result, reminded)
    same(record, memoria.record(reminding, reminded))
    same(after, expected)
