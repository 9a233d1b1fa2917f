"""Every switch against an independent implementation, over random configs and streams."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax import memoria
from rmjax.memoria import MemoriaConfig
from tests.memoria.runs import alive, at, run, serials, small, stream
from tests.oracles import memoria as oracle

configs = st.builds(
    MemoriaConfig,
    working=st.integers(1, 4),
    short_term_capacity=st.integers(0, 9),
    remind_short_term=st.integers(0, 5),
    remind_long_term=st.integers(0, 5),
    search_depth=st.integers(0, 3),
    initial_lifespan=st.sampled_from([1.0, 2.5, 4.0, 6.0]),
    lifespan_extend=st.sampled_from([0.0, 0.5, 2.0, 8.0]),
    dim=st.integers(1, 3),
    long_term_capacity=st.sampled_from([None, 0, 3, 12]),
    correlation=st.sampled_from(["exp", "negative_square"]),
    search_seeds=st.sampled_from(["reminded", "all_short_term", "full"]),
    ties=st.sampled_from(["random", "hash", "oldest", "newest"]),
    follow_zero_edges=st.booleans(),
    order=st.sampled_from(["paper", "released"]),
    lifespan_increment=st.sampled_from(["paper", "released", "given"]),
    counts_dtype=st.sampled_from(["int8", "int16", "int32"]),
)


def given_configs(examples: int):
    """Runs few examples, since every example compiles; a failing example is not shrunk."""
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    how = hypothesis.settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, phases=phases
    )
    return lambda test: how(hypothesis.given(configs, st.integers(0, 2**31))(test))


def agree(config, seed):
    grid = 0.5 if config.correlation == "negative_square" else None
    follow(config, stream(config, 25, seed, grid))


ZEROS = small(working=1, dim=1, correlation="negative_square")  # with scores of 0 and -0, which tie


@hypothesis.example(ZEROS, 381)
@given_configs(5)
def test_random_configs_agree_with_the_oracle(config, seed):
    agree(config, seed)


@pytest.mark.slow
@given_configs(100)
def test_a_hundred_random_configs_agree_with_the_oracle(config, seed):
    agree(config, seed)


@pytest.mark.parametrize(
    "changes",
    [
        {"ties": ties, "search_seeds": seeds, "order": order}
        for ties, order in zip(
            ["random", "hash", "oldest", "newest"], ["paper", "released"] * 2, strict=True
        )
        for seeds in ("reminded", "all_short_term")
    ]
    + [
        {"search_seeds": "full"},
        {"follow_zero_edges": False},
        {"counts_dtype": "int32"},
        {"long_term_capacity": 4},
    ]
    + [{"lifespan_increment": "released"}, {"correlation": "negative_square"}],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_each_switch_agrees_with_the_oracle(changes):
    config = small(**({"lifespan_extend": 4.0} | changes))
    grid = 0.5 if config.correlation == "negative_square" else None
    steps = follow(config, stream(config, 60, 1, grid))
    most = (steps.after.kind == memoria.LONG_TERM).sum(-1).max()
    assert most >= 4, "the case needs a long-term memory"
    assert steps.after.evicted[-1] > 0 or config.long_term_capacity is None


def follow(config, xs, every=1):
    if config.lifespan_increment == "paper":  # shares are rounded, so lifespans must not tie
        rng = np.random.default_rng(0)
        xs = xs | {"weights": rng.random(xs["weights"].shape, np.float32)}
    steps = run(config, xs)
    memory = oracle.Memoria(config)
    salts = np.asarray(jax.vmap(lambda key: jax.random.bits(key, dtype=jnp.uint32))(xs["key"]))
    for t, working in enumerate(xs["working"]):
        short, long, seeds, met = memory.remind(working, int(salts[t]))
        state, reminded = at(steps.reminding, t), at(steps.reminded, t)
        assert serials(reminded.short_term) == short and serials(reminded.long_term) == long, t
        assert set(state.serial[reminded.seeds]) == seeds, t
        assert set(state.serial[reminded.found]) == met, t
        weights = xs["weights"][t]
        k = config.remind_short_term
        places = zip(
            [*short, *long], [*weights[: len(short)], *weights[k : k + len(long)]], strict=True
        )
        memory.memorize(short, long, {serial: float(weight) for serial, weight in places})
        check(config, at(steps.after, t), memory, counts=t % every == every - 1)
    return steps


def check(config, state, memory, counts):
    slots = alive(state)
    assert state.serial[slots].tolist() == list(memory.engrams)
    for name in ("kind", "age"):
        assert getattr(state, name)[slots].tolist() == [
            getattr(e, name) for e in memory.engrams.values()
        ]
    lifespans = [engram.lifespan for engram in memory.engrams.values()]
    np.testing.assert_allclose(state.lifespan[slots], lifespans, rtol=1e-5, atol=1e-5)
    vectors = [engram.vector for engram in memory.engrams.values()] or np.zeros((0, config.dim))
    np.testing.assert_array_equal(state.engrams[slots], vectors)
    assert (state.next_serial, state.evicted) == (memory.next_serial, memory.evicted)
    if not counts:
        return
    actual = np.asarray(memoria.cofire_counts(state))[np.ix_(slots, slots)]
    expected = [[memory.counts[i][j] for j in memory.engrams] for i in memory.engrams]
    np.testing.assert_array_equal(actual, np.reshape(expected, actual.shape))


LANGUAGE = {
    "working": 50,
    "short_term_capacity": 400,
    "remind_short_term": 50,
    "remind_long_term": 50,
}
SHORT_SEGMENTS = {
    "working": 16,
    "short_term_capacity": 128,
    "remind_short_term": 16,
    "remind_long_term": 16,
}
SORTING = {
    "working": 128,
    "short_term_capacity": 512,
    "remind_short_term": 256,
    "remind_long_term": 640,
}
PAPER = {
    "wikitext": (120, LANGUAGE),
    "wikitext, segments of 50": (200, SHORT_SEGMENTS),
    "sorting": (24, SORTING | {"initial_lifespan": 5.0, "max_segments": 24}),
}


RELEASED = {"order": "released", "correlation": "negative_square", "lifespan_increment": "given"}


@pytest.mark.slow
@pytest.mark.parametrize("rules", [RELEASED, {}], ids=["released", "paper"])
@pytest.mark.parametrize("search_seeds", ["reminded", "all_short_term"])
@pytest.mark.parametrize("name", PAPER)
def test_the_sizes_of_the_paper_agree_with_the_oracle(name, search_seeds, rules):
    steps, sizes = PAPER[name]
    config = MemoriaConfig(**sizes, dim=16, search_seeds=search_seeds, ties="hash", **rules)
    xs = stream(config, steps, grid=None) | {"weights": weights_of_8(config, steps)}
    follow(config, xs, every=20)


def weights_of_8(config, steps):
    """Returns multiples of 1/2 whose mean is 8, the paper's alpha."""
    k = config.remind_short_term + config.remind_long_term
    return (np.random.default_rng(0).integers(0, 33, (steps, k)) / 2).astype(np.float32)
