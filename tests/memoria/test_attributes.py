"""The six attributes of a useful Hebbian rule (Memoria Appendix A), over random streams.

The tests derive which engrams fired from the working and the reminded engrams. So they read nothing
that the step of firing wrote, except the edges under test.
"""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from rmjax import memoria
from tests.memoria.runs import at, run, small, stream

CONFIG = small(lifespan_extend=4.0, correlation="negative_square", search_seeds="all_short_term")
STEPS = 30
attribute = hypothesis.settings(max_examples=15, deadline=None, derandomize=True, database=None)


def fired(steps, t) -> set[int]:
    """Returns the serials of M^act at step t."""
    state, reminded = at(steps.reminding, t), at(steps.reminded, t)
    working = state.serial[state.kind == memoria.WORKING].tolist()
    parts = (reminded.short_term, reminded.long_term)
    return set(working).union(*(part.serials[part.valid].tolist() for part in parts))


def edges(state) -> tuple[np.ndarray, np.ndarray]:
    """Returns E and counts over serials [S, S]; NaN where one of the two engrams does not live."""
    slots = state.serial >= 0
    serial = state.serial[slots]
    size = CONFIG.working * STEPS
    weights, counts = np.full((2, size, size), np.nan)
    place = np.ix_(serial, serial)
    weights[place] = np.asarray(memoria.edge_weights(state))[np.ix_(slots, slots)]
    counts[place] = np.asarray(memoria.cofire_counts(state))[np.ix_(slots, slots)]
    return weights, counts


@attribute
@hypothesis.given(st.integers(0, 2**31))
def test_the_six_attributes(seed):
    steps = run(CONFIG, stream(CONFIG, STEPS, seed))
    size = CONFIG.working * STEPS
    together = np.zeros((size, size))
    before = np.full((2, size, size), np.nan)
    for t in range(STEPS):
        fires = np.zeros(size, bool)
        fires[list(fired(steps, t))] = True
        together += fires[:, None] & fires
        after, counts = edges(at(steps.after, t))
        lives = ~np.isnan(after)
        survives = lives & ~np.isnan(before[0])
        off = ~np.eye(size, dtype=bool)

        # Locality: an edge depends only on when its two engrams fired.
        expected = together / np.maximum(together.diagonal(), 1)[:, None]
        np.testing.assert_allclose(after[lives], expected[lives], rtol=1e-6)
        # Cooperativity: an edge rises only if both engrams fire.
        rises = survives & off & (after > before[0])
        assert (fires[:, None] & fires)[rises].all()
        # Synaptic depression: an edge falls if the first engram fires without the second.
        alone = survives & fires[:, None] & ~fires & (before[0] > 0)
        assert (after[alone] < before[0][alone]).all()
        # Boundedness: an edge lies between 0 and 1.
        assert (after[lives] >= 0).all() and (after[lives] <= 1).all()
        # Competition: if an edge of i rises, the edges of i to engrams that did not fire fall.
        falls = (rises.any(1)[:, None] & alone)[survives]
        assert (after[survives][falls] < before[0][survives][falls]).all()
        # Long-term stability: every joint firing still counts.
        assert (counts[lives] == together[lives]).all()
        assert (counts[survives] >= before[1][survives]).all()
        before = np.stack([after, counts])


def test_these_streams_have_partial_edges_between_long_term_engrams():
    steps = run(CONFIG, stream(CONFIG, STEPS, 1))
    last = at(steps.after, -1)
    old = np.asarray(memoria.edge_weights(last))[last.kind == memoria.LONG_TERM]
    assert ((old > 0) & (old < 1)).sum() > 20 and (old == 0).any()


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32"])
def test_a_count_stops_at_the_largest_number_and_never_wraps(dtype):
    config = small(
        counts_dtype=dtype, lifespan_extend=100.0, remind_long_term=0, short_term_capacity=12
    )
    state = memoria.init(config)
    largest = np.iinfo(dtype).max
    state, reminded = memoria.remind(config, state, np.zeros((3, 2), np.float32))
    state = memoria.memorize_and_forget(config, state, reminded, np.ones(2, np.float32))
    state = state.replace(counts=state.counts.at[:3, :3].set(largest - 1))
    for step in range(3):
        state, reminded = memoria.remind(config, state, np.zeros((3, 2), np.float32))
        assert reminded.short_term.valid.all()
        state = memoria.memorize_and_forget(config, state, reminded, np.ones(2, np.float32))
        counts = memoria.cofire_counts(state)
        assert counts.max() == largest and counts.min() >= 0
        assert memoria.edge_weights(state).max() == 1, step
