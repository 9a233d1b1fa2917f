"""Serials never pass 2^31.

Before they would, the living engrams get new serials, and nothing else changes.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from rmjax import memoria
from rmjax.memoria import MemoriaConfig, State
from tests.memoria.runs import _scan, at, given, run, small, stream

CONFIG = small(lifespan_extend=6.0, ties="oldest")
END = 2**31


def later(state: State, serial: int) -> State:
    """Returns the same memory, as if so many more engrams had been born before."""
    alive, fired = np.asarray(state.kind) != memoria.EMPTY, np.asarray(state.fired)
    return state.replace(
        serial=jnp.asarray(np.where(alive, np.asarray(state.serial) + serial, -1), jnp.int32),
        fired=jnp.asarray(np.where(fired > 0, fired + serial, 0), jnp.int32),
        next_serial=jnp.asarray(state.next_serial + serial, jnp.int32),
    )


def same(actual: State, expected: State) -> None:
    """Compares all but the serials and the values of free slots."""
    for field in ("engrams", "kind", "lifespan", "age", "evicted", "by_birth"):
        one, two = getattr(actual, field), getattr(expected, field)
        np.testing.assert_array_equal(one, two, err_msg=field)
    np.testing.assert_array_equal(memoria.cofire_counts(actual), memoria.cofire_counts(expected))
    np.testing.assert_array_equal(memoria.edge_weights(actual), memoria.edge_weights(expected))


@pytest.mark.parametrize("steps_left", [0, 1, 5])
def test_memory_goes_on_past_the_last_serial(steps_left):
    xs = stream(CONFIG, 40)
    before = jax.tree.map(jnp.asarray, at(run(CONFIG, at(xs, slice(20))).after, -1))
    rest = at(xs, slice(20, None))
    expected = run(CONFIG, rest, before)
    room = (END - 1) // CONFIG.working * CONFIG.working - steps_left * CONFIG.working
    steps = run(CONFIG, rest, later(before, room - int(before.next_serial)))
    for step in range(20):
        same(at(steps.after, step), at(expected.after, step))
    serials = np.asarray(steps.after.serial)
    assert serials.max() > 2**30 if steps_left else serials.max() < 200
    assert serials.min() == -1 and serials[-1].max() < 200
    # next_serial / working is the number of the step.
    assert (np.asarray(steps.after.next_serial) % CONFIG.working == 0).all()
    for row, kind in zip(serials, np.asarray(steps.after.kind), strict=True):
        living = row[kind != memoria.EMPTY]
        assert len(set(living)) == len(living) and living.min(initial=0) >= 0


def test_only_active_streams_with_full_serials_are_renumbered():
    xs = stream(CONFIG, 21)
    before = jax.tree.map(jnp.asarray, at(run(CONFIG, at(xs, slice(20))).after, -1))
    end = later(before, (END - 1) // CONFIG.working * CONFIG.working - int(before.next_serial))
    both = jax.tree.map(lambda *x: jnp.stack(x), before, end)
    working = jnp.broadcast_to(xs["working"][20], (2, CONFIG.working, CONFIG.dim))
    step = jax.vmap(functools.partial(memoria.remind, CONFIG), (0, 0, None, 0))
    state, reminded = step(both, working, None, jnp.array([True, True]))
    assert state.next_serial[0] == before.next_serial + CONFIG.working
    assert 0 < state.next_serial[1] < 200
    np.testing.assert_array_equal(reminded.engrams[0], reminded.engrams[1])
    state, _ = step(both, working, None, jnp.array([True, False]))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a[1] == b[1]).all()), state, both))


def test_checked_steps_do_the_same():
    config = MemoriaConfig(**vars(CONFIG) | {"checked": True})
    xs = stream(CONFIG, 20)
    end = later(memoria.init(CONFIG), (END - 1) // CONFIG.working * CONFIG.working)
    error, (last, _) = checkify.checkify(functools.partial(_scan, config, given))(end, xs)
    error.throw()
    same(last, at(run(CONFIG, xs).after, -1))


STRANGE = {
    "kind": lambda s: s.replace(kind=s.kind.at[0].set(7)),
    "by_birth": lambda s: s.replace(by_birth=s.by_birth.at[0].set(s.by_birth[1])),
    "serial": lambda s: s.replace(serial=s.serial.at[s.by_birth[0]].set(s.serial[s.by_birth[1]])),
    "next_serial": lambda s: s.replace(next_serial=jnp.int32(-(2**31))),
    "lifespan": lambda s: s.replace(lifespan=s.lifespan.at[s.by_birth[0]].set(jnp.nan)),
    "counts": lambda s: s.replace(counts=s.counts.at[s.by_birth[0], 1].set(-1)),
    "fired": lambda s: s.replace(fired=s.fired.at[3].set(-2)),
    "age": lambda s: s.replace(age=s.age.at[3].set(-2)),
    "evicted": lambda s: s.replace(evicted=jnp.int32(-1)),
}


@pytest.mark.parametrize("field", STRANGE)
def test_an_impossible_saved_state_is_refused_by_field(tmp_path, field):
    state = jax.tree.map(jnp.asarray, at(run(CONFIG, stream(CONFIG, 20)).after, -1))
    many = jax.tree.map(lambda *x: jnp.stack(x), state, STRANGE[field](state))
    memoria.save(CONFIG, many, tmp_path / "state")
    with pytest.raises(ValueError, match=rf"state is no sound memory: {field} "):
        memoria.load(CONFIG, tmp_path / "state")
    memoria.save(CONFIG, memoria.fork(state, 2), tmp_path / "state")
    memoria.load(CONFIG, tmp_path / "state")


def test_every_field_of_a_state_is_checked():
    assert {*STRANGE, "engrams"} == {field.name for field in dataclasses.fields(State)}
