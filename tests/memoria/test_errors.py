"""Errors name bad input and the cure: shapes while tracing, values if `checked`."""

from __future__ import annotations

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from rmjax import memoria
from rmjax.memoria import MemoriaConfig
from tests.memoria.runs import _scan, given, run, small, stream

CONFIG = small()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"working": 0}, "working=0: must be a whole number, at least 1"),
        ({"working": 2.5}, "working=2.5: must be a whole number"),
        ({"long_term_capacity": -1}, "long_term_capacity=-1: must be a whole number, at least 0"),
        ({"short_term_capacity": -3}, "short_term_capacity=-3"),
        ({"max_segments": 0}, "max_segments=0: must be a whole number, at least 1"),
        ({"remind_long_term": -1}, "remind_long_term=-1"),
        ({"initial_lifespan": float("nan")}, "initial_lifespan=nan: must be a number, at least 0"),
        ({"initial_lifespan": "9"}, "initial_lifespan='9': must be a number, at least 0"),
        ({"initial_lifespan": None}, "initial_lifespan=None: must be a number, at least 0"),
        ({"lifespan_extend": True}, "lifespan_extend=True: must be a number"),
        ({"working": None}, "working=None: must be a whole number"),
        ({"follow_zero_edges": "no"}, "follow_zero_edges='no': must be True or False"),
        ({"checked": 1}, "checked=1: must be True or False"),
        ({"lifespan_extend": -1.0}, "lifespan_extend=-1.0"),
        ({"ties": "first"}, "ties='first': must be one of random, hash, oldest, newest"),
        (
            {"search_seeds": "all"},
            "search_seeds='all': must be one of reminded, all_short_term, full",
        ),
        ({"counts_dtype": "uint16"}, "counts_dtype='uint16': must be one of int8, int16, int32"),
    ],
)
def test_a_wrong_config_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"MemoriaConfig.{message}"):
        small(**changes)


@pytest.mark.parametrize("shape", [(3, 5), (4, 2), (2, 3, 2)])
def test_wrong_shapes_of_working_engrams_are_refused(shape):
    message = r"working has shape .*, expected \[3, 2\] \(config.working, config.dim\)"
    with pytest.raises(ValueError, match=message):
        memoria.remind(CONFIG, memoria.init(CONFIG), jnp.zeros(shape))


def test_a_state_of_another_config_is_refused():
    other = memoria.init(small(long_term_capacity=5))
    message = r"state.engrams is float32\[14, 2\], but this config's is float32\[29, 2\]"
    with pytest.raises(ValueError, match=message):
        memoria.remind(CONFIG, other, jnp.zeros((3, 2)))
    state, reminded = memoria.remind(CONFIG, memoria.init(CONFIG), jnp.zeros((3, 2)))
    message = r"state.counts is int16\[29, 29\], but this config's is int8\[29, 29\]"
    with pytest.raises(ValueError, match=message):
        memoria.memorize_and_forget(small(counts_dtype="int8"), state, reminded, jnp.zeros(5))


def test_many_streams_without_vmap_are_refused():
    with pytest.raises(ValueError, match=r"float32\[4, 29, 2\].*for several streams use jax.vmap"):
        memoria.remind(CONFIG, memoria.fork(memoria.init(CONFIG), 4), jnp.zeros((4, 3, 2)))


def test_active_of_many_streams_without_vmap_is_refused():
    message = r"active has shape \(4,\), expected one bool: for several streams use jax.vmap"
    with pytest.raises(ValueError, match=message):
        memoria.remind(CONFIG, memoria.init(CONFIG), jnp.zeros((3, 2)), None, jnp.ones(4, bool))
    state, reminded = memoria.remind(CONFIG, memoria.init(CONFIG), jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"active has shape \(2,\)"):
        memoria.memorize_and_forget(CONFIG, state, reminded, jnp.zeros(5), jnp.ones(2, bool))


def test_a_config_takes_numpy_numbers():
    config = small(working=np.int64(3), initial_lifespan=np.float32(4), lifespan_extend=2)
    assert config == small() and hash(config) == hash(small()) and json.dumps(vars(config))


def test_random_ties_need_a_key():
    with pytest.raises(ValueError, match="config.ties='random' needs a key"):
        memoria.remind(small(ties="random"), memoria.init(CONFIG), jnp.zeros((3, 2)))


def test_weights_of_another_config_are_refused():
    state, reminded = memoria.remind(CONFIG, memoria.init(CONFIG), jnp.zeros((3, 2)))
    message = r"weights has shape \(4,\), expected \[5\].*2 short-term ones first, then 3"
    with pytest.raises(ValueError, match=message):
        memoria.memorize_and_forget(CONFIG, state, reminded, jnp.zeros(4))
    with pytest.raises(ValueError, match=r"reminded holds \(2, 3\) .* expected \(2, 4\)"):
        memoria.memorize_and_forget(
            small(remind_long_term=4, long_term_capacity=20), state, reminded, jnp.zeros(6)
        )


def test_statistics_and_reset_refuse_wrong_shapes():
    message = r"mask has shape \(3,\), but the state has streams \(2,\)"
    with pytest.raises(ValueError, match=message):
        memoria.reset(memoria.fork(memoria.init(CONFIG), 2), jnp.ones(3, bool))
    record = memoria.Record(*(jnp.zeros((4, 2, 29), jnp.int32),) * 4)
    for statistic in (memoria.mean_age, functools.partial(memoria.autocorrelation, lags=2)):
        message = r"shape \(4, 2, 29\), expected \[T, C\]: take one stream"
        with pytest.raises(ValueError, match=message):
            statistic(record)
    with pytest.raises(ValueError, match="lags=0"):
        memoria.autocorrelation(record, 0)
    with pytest.raises(ValueError, match="one stream's state"):
        memoria.edges_above(memoria.fork(memoria.init(CONFIG), 2), 0.5)


# Values, with `checked=True` under checkify, in two streams. One of the two is wrong.

CHECKED = MemoriaConfig(**vars(CONFIG) | {"checked": True, "search_seeds": "all_short_term"})


@checkify.checkify
@jax.vmap
def checked_remind(state, working, active):
    return memoria.remind(CHECKED, state, working, None, active)


@checkify.checkify
@jax.vmap
def checked_memorize(state, reminded, weights, active):
    return memoria.memorize_and_forget(CHECKED, state, reminded, weights, active)


def step(state, working, weights):
    error, (state, reminded) = checked_remind(state, working, jnp.ones(2, bool))
    error.throw()
    error, after = checked_memorize(state, reminded, weights, jnp.ones(2, bool))
    error.throw()
    return after, state, reminded


def test_a_checked_config_checks_values():
    empty, fine, ones = (
        memoria.fork(memoria.init(CHECKED), 2),
        jnp.zeros((2, 3, 2)),
        jnp.ones((2, 5)),
    )
    after, _, _ = step(empty, fine, ones)
    later, state, reminded = step(after, fine, ones)
    message = "working: engram 2 holds a NaN or an infinity"
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        step(after, fine.at[1, 2, 1].set(jnp.nan), ones)
    message = "weights: entry 1 is -1.0, not a finite number from 0 up"
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        step(after, fine, ones.at[0, 1].set(-1))
    with pytest.raises(checkify.JaxRuntimeError, match="reminded: entry 0 is not in the state"):
        checked_memorize(
            checked_remind(empty, fine, jnp.ones(2, bool))[1][0], reminded, ones, jnp.ones(2, bool)
        )[0].throw()
    with pytest.raises(checkify.JaxRuntimeError, match="no step has begun: call remind first"):
        checked_memorize(later, reminded, ones, jnp.ones(2, bool))[0].throw()
    # Values that are not active or not valid may be anything.
    off = jnp.array([True, False])
    checked_remind(after, fine.at[1].set(jnp.nan), off)[0].throw()
    checked_memorize(state, reminded, ones.at[1].set(jnp.nan), off)[0].throw()
    step(empty, fine, jnp.full((2, 5), jnp.nan))


def test_checking_changes_no_result():
    config = MemoriaConfig(**vars(CHECKED) | {"lifespan_extend": 6.0})
    xs = stream(config, 30, grid=None)
    checked = checkify.checkify(functools.partial(_scan, config, given))
    error, (_, steps) = checked(memoria.init(config), xs)
    error.throw()
    assert steps.reminded.found.any()
    chex.assert_trees_all_equal(steps, run(MemoriaConfig(**vars(config) | {"checked": False}), xs))


def test_unchecked_nan_does_not_spread():
    state, reminded = memoria.remind(
        CONFIG, memoria.init(CONFIG), jnp.zeros((3, 2)).at[1].set(jnp.nan)
    )
    state = memoria.memorize_and_forget(CONFIG, state, reminded, jnp.ones(5))
    state, reminded = memoria.remind(CONFIG, state, jnp.ones((3, 2)))
    assert reminded.short_term.serials.tolist() == [0, 2], "an engram that is NaN comes last"
    state = memoria.memorize_and_forget(CONFIG, state, reminded, jnp.ones(5))
    state, reminded = memoria.remind(CONFIG, state, jnp.full((3, 2), jnp.nan))
    assert reminded.short_term.serials.tolist() == [0, 1], "of equal engrams the oldest come first"
    assert jnp.isfinite(state.lifespan).all()


def test_reminded_engrams_that_died_are_left_out():
    state = memoria.init(CONFIG)
    for _ in range(2):
        state, reminded = memoria.remind(CONFIG, state, jnp.zeros((3, 2)))
        state = memoria.memorize_and_forget(CONFIG, state, reminded, jnp.ones(5))
    fresh, nothing = memoria.remind(CONFIG, memoria.init(CONFIG), jnp.zeros((3, 2)))
    with_old = memoria.memorize_and_forget(
        CONFIG, fresh.replace(serial=fresh.serial + 50), reminded, jnp.ones(5)
    )
    without = memoria.memorize_and_forget(
        CONFIG, fresh.replace(serial=fresh.serial + 50), nothing, jnp.ones(5)
    )
    assert (with_old.lifespan == without.lifespan).all()
