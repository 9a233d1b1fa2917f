"""The laws of every sequence model, whatever its memory."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax.models.scan import unroll
from tests.models.small import MODELS, SIZES, N, models, noisy, streams

B, T = 3, 5


SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ("transformer", "compressive", "infinity")]
VARIANTS = ("transformer-xl-long", "memoria-layer")  # variants of models with laws of their own


@pytest.fixture(
    params=[
        pytest.param(kind, marks=pytest.mark.slow if kind in VARIANTS else ()) for kind in MODELS
    ]
)
def model(request):
    return MODELS[request.param]


@functools.cache
def learned(model):
    return noisy(model.init, scale=0.2)


@functools.cache
def run(model, **how):
    @jax.jit
    def read(params, state, tokens, mask, reset, key):
        logits = lambda hidden, _: model.logits(params, hidden)
        return unroll(model, params, state, tokens, mask, logits, reset=reset, key=key, **how)

    def call(params, state, tokens, mask, reset=None, key=None):
        """Reads streams [B, T] with one compiled program."""
        reset = np.zeros(tokens.shape[:2], bool) if reset is None else reset
        return read(params, state, tokens, mask, reset, key)

    return call


@functools.cache
def step(model):
    return jax.jit(lambda *args: model.step(*args))


def test_reading_in_parts_equals_reading_at_once(model):
    """Parts are filled up with empty segments, so that all readings are one program."""
    params, (tokens, mask) = learned(model), streams(jax.random.key(2), B, T)
    state, logits, aux = run(model)(params, model.init_state(params, B), tokens, mask)
    part = lambda x, *cut: np.pad(x[:, slice(*cut)], ((0, 0), (0, T - cut[1] + cut[0]), (0, 0)))
    one, two = ([part(x, *cut) for x in (tokens, mask)] for cut in ((0, 3), (3, T)))
    first, before, some = run(model)(params, model.init_state(params, B), *one)
    last, after, rest = run(model)(params, first, *two)
    chex.assert_trees_all_close(last, state, rtol=1e-5, atol=1e-5)
    parts = jnp.concatenate([before[:3], after[: T - 3]])
    chex.assert_trees_all_close(parts, logits, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(jax.tree.map(jnp.add, some, rest), aux, rtol=1e-5)


@pytest.mark.parametrize("kind", ["transformer-xl", "memoria"])
def test_parts_need_no_padding(kind):
    model = MODELS[kind]
    params, (tokens, mask) = learned(model), streams(jax.random.key(2), B, T)
    state, logits, _ = run(model)(params, model.init_state(params, B), tokens, mask)
    last, parts = model.init_state(params, B), []
    for cut in (slice(0, 2), slice(2, T)):
        last, part, _ = run(model)(params, last, tokens[:, cut], mask[:, cut])
        parts.append(part)
    chex.assert_trees_all_close(last, state, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(jnp.concatenate(parts), logits, rtol=1e-5, atol=1e-5)


def test_the_scan_equals_a_loop_of_steps(model):
    params, (tokens, mask) = learned(model), streams(jax.random.key(2), B, T)
    state, logits, _ = run(model)(params, model.init_state(params, B), tokens, mask)
    looped = model.init_state(params, B)
    for t in range(T):
        hidden, looped, _ = step(model)(params, looped, tokens[:, t], mask[:, t])
        chex.assert_trees_all_close(model.logits(params, hidden), logits[t], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(looped, state, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(looped, model.init_state(params, B))


def test_later_tokens_do_not_change_earlier_logits(model):
    params, (tokens, mask) = learned(model), streams(jax.random.key(3), B, T)
    other = tokens.at[:, 3, 5].set((tokens[:, 3, 5] + 1) % 11)
    _, logits, _ = run(model)(params, model.init_state(params, B), tokens, mask)
    _, changed, _ = run(model)(params, model.init_state(params, B), other, mask)
    np.testing.assert_array_equal(logits[:3], changed[:3])
    np.testing.assert_allclose(logits[3, :, :5], changed[3, :, :5], atol=1e-6)
    assert (jnp.abs(logits[3, :, 5] - changed[3, :, 5]).max(-1) > 1e-4).all()


def test_earlier_segments_matter_where_the_model_has_a_memory(model):
    """After another past, all models but the plain Transformer give other logits."""
    params, (tokens, mask) = learned(model), streams(jax.random.key(4), B, T)
    other = tokens.at[:, 1].set((tokens[:, 1] + 1) % 11)
    _, logits, _ = run(model)(params, model.init_state(params, B), tokens, mask)
    _, changed, _ = run(model)(params, model.init_state(params, B), other, mask)
    moved = jnp.abs(logits[2] - changed[2]).max((1, 2))
    assert (moved == 0).all() if model is MODELS["transformer"] else (moved > 1e-4).all()


def test_rows_are_independent(model):
    params, (tokens, mask) = learned(model), streams(jax.random.key(5), B, T)
    mask = mask.at[1, 2, 5:].set(False).at[2, 3].set(False)
    order = jnp.array([2, 0, 1])
    state, logits, _ = run(model)(params, model.init_state(params, B), tokens, mask)
    permuted, others, _ = run(model)(
        params, model.init_state(params, B), tokens[order], mask[order]
    )
    np.testing.assert_array_equal(others, logits[:, order])
    chex.assert_trees_all_equal(permuted, jax.tree.map(lambda x: x[order], state))


def test_padded_segments_and_padded_tokens_change_nothing(model):
    params, (tokens, mask) = learned(model), streams(jax.random.key(6), B, T)
    mask = mask.at[:, 2].set(False).at[:, 4, 6:].set(False)
    other = jnp.where(mask, tokens, (tokens + 1) % 11)
    state, logits, _ = run(model)(params, model.init_state(params, B), tokens, mask)
    again, same, _ = run(model)(params, model.init_state(params, B), other, mask)
    later = jnp.array([0, 1, 3, 4, 2])  # the padded segment last
    moved, others, _ = run(model)(
        params, model.init_state(params, B), tokens[:, later], mask[:, later]
    )
    valid = mask.swapaxes(0, 1)
    np.testing.assert_array_equal(logits[valid], same[valid])
    np.testing.assert_allclose(others[valid[later]], logits[later][valid[later]], atol=1e-5)
    chex.assert_trees_all_close(moved, state, rtol=1e-5, atol=1e-5)
    hidden, kept, _ = step(model)(params, again, tokens[:, 2], mask[:, 2])
    chex.assert_trees_all_equal(kept, again)
    assert jnp.isfinite(hidden).all()


def test_after_a_reset_a_stream_begins_anew(model):
    params, (tokens, mask) = learned(model), streams(jax.random.key(7), B, T)
    reset = jnp.zeros((B, T), bool).at[1, 2].set(True)
    _, logits, _ = run(model)(params, model.init_state(params, B), tokens, mask, reset)
    _, straight, _ = run(model)(params, model.init_state(params, B), tokens, mask)
    _, fresh, _ = run(model)(params, model.init_state(params, B), jnp.roll(tokens, -2, 1), mask)
    np.testing.assert_allclose(logits[2:, 1], fresh[: T - 2, 1], atol=1e-6)
    np.testing.assert_allclose(logits[:, ::2], straight[:, ::2], atol=1e-6)


@pytest.mark.parametrize("segments", [pytest.param(1, marks=pytest.mark.slow), 2, 0])
def test_gradients_pass_through_gradient_segments(model, segments):
    """The gradient of the last segment's loss, for the word of every segment."""
    params, (tokens, mask) = learned(model), streams(jax.random.key(8), B, T)
    # Words 1, 2 and 3 are those of segments 2, 3 and 4.
    tokens = tokens.at[:].set(0).at[:, 2].set(1).at[:, 3].set(2).at[:, 4].set(3)

    def loss(words):
        return run(model, gradient_segments=segments)(
            params | {"wte": words}, model.init_state(params, B), tokens, mask
        )[1][-1, :, :, 5].sum()

    moved = np.abs(jax.jit(jax.grad(loss))(params["wte"])[:4]).max(1) > 0
    assert moved[3]
    if model is MODELS["transformer"]:
        assert not moved[:3].any()
    elif segments:
        assert moved[2] == (segments == 2) and not moved[:2].any()
    else:
        assert moved[2] and moved[1]


@pytest.mark.parametrize("kind", ["transformer-xl", "memoria", *SLOW])
def test_silent_segments_are_read_without_gradients(kind):
    model = MODELS[kind]
    params, (tokens, mask) = learned(model), streams(jax.random.key(9), B, T)
    state, logits, _ = run(model)(params, model.init_state(params, B), tokens, mask)
    quiet, last, _ = run(model, silent=3)(params, model.init_state(params, B), tokens, mask)
    np.testing.assert_allclose(last, logits[3:], atol=1e-6)
    chex.assert_trees_all_close(quiet, state, rtol=1e-5, atol=1e-5)
    tokens = tokens.at[:].set(0).at[:, 2].set(1).at[:, 3].set(2)

    def loss(words):
        _, logits, (aux, _) = run(model, silent=3, gradient_segments=0)(
            params | {"wte": words}, model.init_state(params, B), tokens, mask
        )
        return logits[-1, :, :, 5].sum() + aux

    moved = np.abs(jax.jit(jax.grad(loss))(params["wte"])[:4]).max(1) > 0
    assert not moved[1] and moved[2] == (model is not MODELS["transformer"])


def test_half_precision_keeps_the_dtypes_of_the_state():
    """No dtype of the state changes, and the logits are near those of full precision."""
    halves = models(dataclasses.replace(SIZES, dtype="bfloat16"))
    for kind in ("transformer-xl", "memoria"):
        full, half = MODELS[kind], halves[kind]
        params, (tokens, mask) = full.init(jax.random.key(14)), streams(jax.random.key(15), B, T)
        state, logits, _ = run(half)(params, half.init_state(params, B), tokens, mask)
        chex.assert_trees_all_equal_dtypes(state, half.init_state(params, B))
        expected = run(full)(params, full.init_state(params, B), tokens, mask)[1]
        assert logits.dtype == jnp.float32, kind
        np.testing.assert_allclose(
            logits, expected, atol=0.05 * np.abs(expected).max(), err_msg=kind
        )


def test_recomputed_layers_have_the_same_gradients():
    again = models(dataclasses.replace(SIZES, remat=True))
    tokens, mask = streams(jax.random.key(16), B, T)
    for kind in ("transformer-xl", "memoria"):
        params = learned(MODELS[kind])
        marks = []
        for m in (again[kind], MODELS[kind]):
            state = m.init_state(params, B)
            program = jax.make_jaxpr(m.step)(params, state, tokens[:, 0], mask[:, 0])
            marks.append(str(program).count("policy=None"))
        assert marks[0] == marks[1] + SIZES.layers
    params, keys = learned(MODELS["transformer-xl"]), jax.random.split(jax.random.key(17), B)

    def loss(params, model):
        return run(model)(params, model.init_state(params, B), tokens, mask, None, keys)[1].sum()

    gradient, expected = (
        jax.jit(jax.grad(functools.partial(loss, model=of["transformer-xl"])))(params)
        for of in (again, MODELS)
    )
    chex.assert_trees_all_close(gradient, expected, rtol=1e-3, atol=1e-3)


def test_dropout_is_drawn_for_each_stream(model):
    params, (tokens, mask) = learned(model), streams(jax.random.key(10), B, T)
    keys, order = jax.random.split(jax.random.key(11), B), jnp.array([1, 2, 0])
    _, logits, _ = run(model)(params, model.init_state(params, B), tokens, mask, None, keys)
    _, others, _ = run(model)(
        params, model.init_state(params, B), tokens[order], mask[order], None, keys[order]
    )
    _, plain, _ = run(model)(params, model.init_state(params, B), tokens, mask)
    np.testing.assert_allclose(others, logits[:, order], atol=1e-6)
    assert jnp.abs(logits - plain).max() > 1e-3


def test_a_second_call_compiles_nothing(model):
    params, (tokens, mask) = learned(model), streams(jax.random.key(12), B, 2)
    _, state, _ = step(model)(params, model.init_state(params, B), tokens[:, 0], mask[:, 0])
    step(model)(params, state, tokens[:, 1], mask[:, 1])
    assert step(model)._cache_size() == 1
    jax.eval_shape(model.init, jax.random.key(0))


def test_a_too_long_segment_is_named(model):
    params, (tokens, mask) = learned(model), streams(jax.random.key(13), 1, 1, N + 1)
    if model in [MODELS[k] for k in ("transformer", "infinity", "memoria", "memoria-layer")]:
        cause = "a segment of 9 tokens is longer than the model's positions 8"
        with pytest.raises(ValueError, match=cause):
            model.step(params, model.init_state(params, 1), tokens[:, 0], mask[:, 0])
