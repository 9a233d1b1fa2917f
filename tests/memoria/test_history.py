"""Statistics of a history against their definitions, one engram at a time.

Also the steps that a record leaves out, and the figures.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax import memoria
from rmjax.memoria import LONG_TERM, SHORT_TERM, plots
from tests.memoria.runs import at, run, small, stream

CONFIG = small(lifespan_extend=5.0, remind_short_term=3)


@pytest.fixture(scope="module")
def steps():
    return run(CONFIG, stream(CONFIG, 40, 2, grid=None))


@pytest.fixture(scope="module")
def history(steps):
    return jax.tree.map(np.asarray, jax.vmap(memoria.record)(steps.reminding, steps.reminded))


def reminded_serials(steps, t, part):
    engrams = getattr(at(steps.reminded, t), part)
    return engrams.serials[engrams.valid]


def test_mean_age_is_that_of_the_reminded(steps, history):
    ages = memoria.mean_age(history)
    assert np.isnan(ages[0]) and ages.shape == (40,)
    for t in range(40):
        serials = reminded_serials(steps, t, "long_term")
        each_age = [t - serial // CONFIG.working for serial in serials]
        expected = np.mean(each_age) if each_age else np.nan
        np.testing.assert_allclose(ages[t], expected)


@pytest.mark.parametrize("kind, part", [(SHORT_TERM, "short_term"), (LONG_TERM, "long_term")])
def test_autocorrelation_is_that_of_each_engram(steps, history, kind, part):
    series = {}
    for t in range(40):
        state, reminded = at(steps.reminding, t), reminded_serials(steps, t, part)
        for serial in state.serial[state.kind == kind]:
            series.setdefault(serial, []).append(float(serial in reminded))
    for lag in range(1, 8):
        coefficients, weights = [], []
        for x in map(np.array, series.values()):
            if len(x) > lag:
                d = x - x.mean()
                coefficients.append((d[:-lag] * d[lag:]).sum() / (d * d).sum() if d.any() else 1.0)
                weights.append(len(x) if kind == LONG_TERM else 1)
        expected = np.average(coefficients, weights=weights) if weights else np.nan
        np.testing.assert_allclose(memoria.autocorrelation(history, 7, kind)[lag - 1], expected)
    assert not np.isnan(memoria.autocorrelation(history, 1, kind)).any()


def test_states_after_the_step_are_refused(steps):
    wrong = jax.vmap(memoria.record)(steps.after, steps.reminded)
    for statistic in (memoria.mean_age, lambda history: memoria.autocorrelation(history, 2)):
        with pytest.raises(ValueError, match="states after memorize_and_forget"):
            statistic(wrong)


def test_autocorrelation_is_nan_where_no_engram_stays_long_enough(history):
    assert np.isnan(memoria.autocorrelation(at(history, slice(1)), 3)).all()
    assert np.isnan(memoria.autocorrelation(history, 60)[40:]).all()


def test_statistics_skip_inactive_steps(history):
    xs = stream(CONFIG, 40, 2, grid=None)
    pad = lambda x: np.insert(x, [5, 5, 20, 40], 7, axis=0)
    padded = {name: pad(np.asarray(value)) for name, value in xs.items() if name != "key"}
    padded |= {
        "active": np.insert(xs["active"], [5, 5, 20, 40], False),
        "key": jax.random.split(jax.random.key(0), 44),
    }
    steps = run(CONFIG, padded)
    longer = jax.vmap(memoria.record)(steps.reminding, steps.reminded)
    ages = memoria.mean_age(longer)
    np.testing.assert_array_equal(ages[padded["active"]], memoria.mean_age(history))
    assert np.isnan(ages[~padded["active"]]).all()
    for kind in (SHORT_TERM, LONG_TERM):
        expected = memoria.autocorrelation(history, 9, kind)
        np.testing.assert_array_equal(memoria.autocorrelation(longer, 9, kind), expected)


def test_edges_above_a_weight_are_those_of_the_matrix(steps):
    state = at(steps.after, -1)
    weights = np.asarray(memoria.edge_weights(state))
    actual = {(i, j): w for i, j, w in zip(*memoria.edges_above(state, 0.5), strict=True)}
    expected = {}
    for i, j in np.ndindex(weights.shape):
        if i != j and weights[i, j] >= 0.5:
            expected[state.serial[i], state.serial[j]] = weights[i, j]
    assert actual.keys() == expected.keys() and len(actual) > 10
    for pair, weight in expected.items():
        np.testing.assert_allclose(actual[pair], weight, rtol=1e-6)
    assert -1 not in {serial for pair in actual for serial in pair}
    number = (weights > 0).sum() - (weights.diagonal() > 0).sum()
    assert len(memoria.edges_above(state, 0.0)[0]) == number


# Figures: the file is written, and the figure shows the numbers.


def test_figure_5_and_6_draw_the_numbers(history, tmp_path):
    ages = memoria.mean_age(history)
    figure = plots.mean_age(ages, tmp_path / "ages.png")
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), ages)
    coefficients = memoria.autocorrelation(history, 7)
    figure = plots.autocorrelation(coefficients, tmp_path / "lags.svg")
    np.testing.assert_array_equal(
        figure.axes[0].lines[0].get_xydata(), np.stack([np.arange(1, 8), coefficients], 1)
    )
    assert {path.name for path in tmp_path.iterdir()} == {"ages.png", "lags.svg"}


def test_figures_9_and_10_draw_engrams_and_edges(steps, tmp_path):
    states = {f"t = {t}": at(steps.after, t) for t in (10, 39)}
    figures = [
        plots.engrams(CONFIG, states, 0.5, tmp_path / "engrams.png"),
        plots.seen_twice(CONFIG, states, 0.5, 20, tmp_path / "twice.png"),
    ]
    for figure in figures:
        for axis, (title, state) in zip(figure.axes, states.items(), strict=True):
            lines, *dots = axis.collections
            assert axis.get_title() == title
            assert sum(len(part.get_offsets()) for part in dots) == (state.serial >= 0).sum()
            assert len(lines.get_segments()) == len(memoria.edges_above(state, 0.5)[0])
    # An engram of step 30 stands in column 10 of the second row, above an engram of step 10.
    dots = np.concatenate([part.get_offsets() for part in figures[1].axes[1].collections[1:]])
    serials = np.concatenate(
        [states["t = 39"].serial[states["t = 39"].kind == kind] for kind in plots.KINDS]
    )
    assert (dots[:, 0] == serials // 3 % 20).all() and (np.floor(dots[:, 1]) == serials // 60).all()
    for name in ("engrams.png", "twice.png"):
        assert (tmp_path / name).stat().st_size > 1000


def test_figures_of_empty_memories():
    empty = {"t = 0": jax.tree.map(jnp.asarray, memoria.init(CONFIG))}
    assert len(plots.engrams(CONFIG, empty, 0.5).axes) == 1
    assert len(plots.seen_twice(CONFIG, empty, 0.5, 4).axes) == 1
    with pytest.raises(ValueError, match="period=0, must be at least 1"):
        plots.seen_twice(CONFIG, empty, 0.5, 0)
    with pytest.raises(ValueError, match="no state was given"):
        plots.engrams(CONFIG, {}, 0.5)
