"""Parts of the sequence models, compared with independent implementations."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax import memoria
from rmjax.layers import compressive, queue
from rmjax.layers.relative import RelativeAttention, shift, sinusoids
from rmjax.models import compressive as compressive_transformer
from rmjax.models import gpt2, infinity, transformer_xl
from rmjax.models.memoria_gpt2 import Abstractor
from rmjax.models.scan import unroll
from tests.models.small import ENGRAMS, MODELS, SIZES, N, compiled, noisy, streams

KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnums=0)
def read(model, params, tokens, mask):
    """The state after the streams, the hidden states, and the model's aux (sum, count)."""
    state = model.init_state(params, len(tokens))
    return unroll(model, params, state, tokens, mask, lambda hidden, _: hidden)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_queue_equals_a_list_of_its_newest_rows():
    """Pushes random numbers of rows, zero included, for three streams at once."""
    rng, size = np.random.default_rng(0), 5
    lists = [[], [], []]
    q, fallen_lists = queue.empty(3, size, 2), [[], [], []]
    for step in range(12):
        count = rng.integers(0, 5, 3)
        rows, mask = normal(3, 4, 2, seed=step), np.arange(4) < count[:, None]
        q, fallen, fallen_mask = queue.push(q, rows, mask)
        for b in range(3):
            lists[b] += list(rows[b, : count[b]])
            fallen_lists[b] += list(np.asarray(fallen)[b][np.asarray(fallen_mask)[b]])
            kept = lists[b][-size:]
            pairs = lambda rows: np.reshape(rows, (-1, 2))
            queued = np.asarray(q.rows)[b][np.asarray(q.mask)[b]]
            np.testing.assert_array_equal(queued, pairs(kept))
            expected = pairs(lists[b][: -len(kept) or None])
            np.testing.assert_array_equal(pairs(fallen_lists[b]), expected)
            order = np.diff(np.asarray(fallen_mask)[b].astype(int))
            assert np.all(order >= 0)  # the newest row is last


def test_shift_is_a_gather_by_distance():
    scores, m = normal(2, 3, 4, 7), 3
    shifted = shift(scores)
    for i in range(4):
        for j in range(m + i + 1):
            np.testing.assert_array_equal(shifted[..., i, j], scores[..., i, 6 - (m + i - j)])


@pytest.mark.parametrize("same_length, clamp", [(False, 0), (True, 0), (False, 3)])
def test_relative_attention_follows_its_equation(same_length, clamp):
    """Dai et al. 2019, section 3.3, one pair of words at a time, in f64."""
    x, memory = normal(2, 4, 6), normal(2, 5, 6, seed=1)
    mask, memory_mask = np.arange(4) < [[4], [3]], np.arange(5) >= [[0], [2]]
    module = RelativeAttention(2, same_length=same_length, clamp=clamp)
    params = noisy(module.init, x, mask, memory, memory_mask)["params"]
    out = module.apply({"params": params}, x, mask, memory, memory_mask)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    kernel = lambda name: p[name]["kernel"].T
    for b in range(2):
        rows, valid = np.concatenate([memory[b], x[b]]), np.concatenate([memory_mask[b], mask[b]])
        for i in range(4):
            heads = []
            for h in range(2):
                part = slice(3 * h, 3 * h + 3)
                q = (x[b, i] @ kernel("query"))[part]
                scores, values = [], []
                for j in range(9):
                    distance = 5 + i - j
                    if distance < 0 or not valid[j] or (same_length and distance >= 5):
                        continue
                    wave = np.asarray(sinusoids(np.float32(min(distance, clamp or 99)), 6))
                    r = wave @ kernel("relative")
                    k = rows[j] @ kernel("key")
                    s = (q + p["content_bias"][h]) @ k[part] + (q + p["position_bias"][h]) @ r[part]
                    scores.append(s / np.sqrt(3))
                    values.append((rows[j] @ kernel("value"))[part])
                weights = np.exp(np.array(scores) - max(scores)) if scores else np.zeros(0)
                heads.append(weights @ np.array(values).reshape(-1, 3) / max(weights.sum(), 1e-30))
            expected = np.concatenate(heads) @ kernel("out")
            np.testing.assert_allclose(out[b, i], expected, rtol=1e-4, atol=1e-5)


def test_transformer_xl_of_one_layer_reads_two_segments_as_one():
    """A memory holds a layer's inputs, so one layer sees what a segment twice as long has."""
    sizes = gpt2.Sizes(vocabulary=11, positions=2 * N, dim=16, layers=1, heads=2)
    normed_after = transformer_xl.make(sizes, memory=N, same_length=False, clamp=0)
    tokens, mask = streams(KEY, 3, 2)
    # Nothing is compressed in two segments.
    normed_before = compressive_transformer.make(sizes, memory=N, compressed=2)
    for model in map(compiled, (normed_after, normed_before)):
        params = noisy(model.init)
        _, first, _ = read(model, params, tokens, mask)
        both = tokens.reshape(3, -1), mask.reshape(3, -1)
        hidden, _, _ = model.step(params, model.init_state(params, 3), *both)
        np.testing.assert_allclose(np.concatenate(list(first), 1), hidden, atol=1e-5)


def test_compression_is_a_convolution_counted_from_the_end():
    params = noisy(lambda key: compressive.init_compression(key, 3, 4))
    rows, mask = normal(2, 6, 3), np.arange(6) >= [[0], [3]]
    short, short_mask = compressive.compress(params, rows, mask)
    np.testing.assert_array_equal(short_mask, [[True, True], [False, True]])
    padded = np.concatenate([np.zeros((2, 2, 3)), np.where(mask[..., None], rows, 0)], 1)
    for b, group in [(0, 0), (0, 1), (1, 1)]:
        inputs = padded[b, 4 * group : 4 * group + 4].reshape(-1)
        expected = inputs @ params["kernel"] + params["bias"]
        np.testing.assert_allclose(short[b, group], expected, rtol=1e-5, atol=1e-5)


def test_old_rows_keep_their_order_and_none_is_lost_early():
    mean = {"kernel": jnp.tile(jnp.eye(1) / 2, (2, 1)), "bias": jnp.zeros(1)}
    memory = compressive.empty(1, 4, 3, 1)
    for first in range(0, 16, 4):
        rows = jnp.arange(first, first + 4.0).reshape(1, 4, 1)
        memory, _ = compressive.push(mean, memory, rows, jnp.ones((1, 4), bool))
    np.testing.assert_array_equal(memory.rows[0, :, 0], [6.5, 8.5, 10.5, 12, 13, 14, 15])
    assert memory.mask.all()


def test_a_compression_without_loss_has_no_reconstruction_loss():
    model = compressive_transformer.make(SIZES, memory=4, compressed=8, rate=1)
    params = noisy(model.init)
    exact = {"kernel": jnp.eye(SIZES.dim), "bias": jnp.zeros(SIZES.dim)}
    params |= {"compression": {name: exact for name in params["compression"]}}
    tokens, mask = streams(KEY, 2, 3)
    _, _, (loss, count) = read(model, params, tokens, mask)
    # In every segment, the first included, 8 rows leave the memory of 4.
    assert count == 2 * 3 * N and loss < 1e-8
    model = MODELS["compressive"]
    lost = lambda p: read(model, p, tokens, mask)[2][0]
    learns = jax.jit(jax.grad(lost))(noisy(model.init))
    moved = {k for k, v in jax.tree_util.tree_leaves_with_path(learns) if np.abs(v).max() > 0}
    assert moved and all(path[0].key == "compression" for path in moved)


def test_a_long_term_memory_follows_its_equations():
    """Every query is a Gaussian in time, summed over a fine grid; its masses are given by erf."""
    sizes = gpt2.Sizes(vocabulary=5, dim=4, layers=1, heads=2, dropout=0.0)
    signal = infinity.Signal(segment_length=6, basis=10, samples=7)
    module, mask = infinity.LongTermMemory(sizes, signal), np.arange(3) < [[3], [2]]
    past = infinity.Past(
        rows=normal(2, 6, 4),
        coefficients=0.1 * normal(2, 10, 4, seed=1),
        density=np.abs(normal(2, infinity.BINS, seed=2)),
        rows_seen=np.array([2, 0]),
    )
    query = normal(2, 3, 2, 2, seed=3)
    params = noisy(lambda key: module.init(key, query, mask, past, None), scale=0.5)
    out, after, (kl, count) = module.apply(params, query, mask, past, None)
    p = jax.tree.map(np.asarray, params["params"])
    linear = lambda name, x: x @ p[name]["kernel"].T + p[name]["bias"]
    padded = np.pad(past.rows[0], [(1, 1), (0, 0)])
    gate = sum(padded[k : k + 6] @ p["gate"]["kernel"][k] for k in range(3)) + p["gate"]["bias"]
    rows = past.rows[0] / (1 + np.exp(-gate))
    old = signal.psi(np.asarray(module.sample(past.density))[0]) @ past.coefficients[0]
    coefficients = signal.again @ np.concatenate([old, rows])
    np.testing.assert_allclose(after.coefficients[0], coefficients, rtol=1e-4, atol=1e-5)
    keys, values = (linear(name, coefficients).reshape(10, 2, 2) for name in ("key", "value"))
    t, edges = np.linspace(-6, 7, 400_001), np.linspace(0, 1, infinity.BINS + 1)
    read, divergence, density = np.zeros((3, 2, 2)), 0.0, np.zeros(infinity.BINS)
    for n in range(3):
        for h in range(2):
            logits = keys[:, h] @ query[0, n, h] / np.sqrt(2)
            mean = 1 / (1 + np.exp(-logits @ p["mean"]))
            s2 = max(np.log1p(np.exp(logits @ p["variance"])), 1e-4)
            at = np.exp(-((t - mean) ** 2) / (2 * s2)) / np.sqrt(2 * np.pi * s2)
            parts = zip(np.split(t[:-1], 80), np.split(at[:-1], 80), strict=True)
            expected = sum(signal.psi(x).T @ y for x, y in parts)
            read[n, h] = expected * (t[1] - t[0]) @ values[:, h]
            divergence += np.log(signal.prior / np.sqrt(s2)) + s2 / (2 * signal.prior**2) - 0.5
            below = [0.5 * (1 + math.erf((edge - mean) / np.sqrt(2 * s2))) for edge in edges]
            density += np.diff(below)
    np.testing.assert_allclose(out[0], linear("out", read.reshape(3, 4)), rtol=1e-3, atol=1e-4)
    # The other stream has no past to attend to.
    np.testing.assert_allclose((kl, count), (divergence, 3 * 2), rtol=1e-4)
    np.testing.assert_allclose(after.density[0], density, rtol=1e-3, atol=1e-5)
    assert not np.any(out[1]) and not np.any(after.density[1])
    plain = infinity.LongTermMemory(sizes, dataclasses.replace(signal, sticky=False))
    even = plain.sample(past.density)
    np.testing.assert_allclose(even, np.tile((np.arange(7) + 0.5) / 7, (2, 1)), rtol=1e-6)


def test_a_reconstruction_loss_by_hand():
    """Attention to the two rows that leave the memory, and to their compressed row."""
    model = compressive_transformer.make(SIZES, memory=2, compressed=3, rate=2)
    params = noisy(model.init)
    block, compression = params["h_0"], params["compression"]["h_0"]
    layer = compressive.empty(1, 2, 3, 16)
    rows = normal(1, 2, 16, seed=4)
    layer, _ = compressive.push(compression, layer, rows, np.ones((1, 2), bool))
    x, seen = normal(1, 2, 16, seed=5), np.ones((1, 2), bool)
    _, (fallen, fallen_mask) = compressive.push(compression, layer, x, seen)
    loss = jax.jit(compressive.reconstruction_loss, static_argnums=2)
    lost, count = loss(block, compression, SIZES.heads, x, seen, fallen, fallen_mask)
    p = jax.tree.map(np.asarray, block)
    old = np.asarray(layer.recent.rows[0])
    new = old.reshape(1, -1) @ np.asarray(compression["kernel"]) + np.asarray(compression["bias"])

    def norm(y):
        spread, part = np.sqrt(y.var(-1, keepdims=True) + 1e-5), p["attention_norm"]
        return (y - y.mean(-1, keepdims=True)) / spread * part["scale"] + part["bias"]

    def attended(rows):
        project = lambda name, y: (norm(y) @ p["attention"][name]["kernel"].T).reshape(-1, 2, 8)
        scores = np.einsum("ihe,jhe->hij", project("query", x[0]), project("key", rows))
        scores /= np.sqrt(8)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        return np.einsum("hij,jhe->ihe", weights, project("value", rows))

    np.testing.assert_allclose(lost, ((attended(old) - attended(new)) ** 2).sum() / 16, rtol=1e-4)
    assert count == 2


def test_a_smooth_signal_is_kept_and_shrinks_when_more_comes():
    signal = infinity.Signal(segment_length=128, basis=128, samples=128)
    wave = lambda t: np.stack([np.sin(2 * np.pi * t), np.cos(4 * np.pi * t)], -1)
    t = (np.arange(128) + 0.5) / 128
    first = signal.first @ wave(t)
    np.testing.assert_allclose((signal.psi(t) @ first)[8:-8], wave(t)[8:-8], atol=0.1)
    again = signal.again @ np.concatenate([signal.psi(t) @ first, -wave(t)])
    np.testing.assert_allclose((signal.psi(t / 2) @ again)[8:-8], wave(t)[8:-8], atol=0.2)
    np.testing.assert_allclose((signal.psi(0.5 + t / 2) @ again)[8:-8], -wave(t)[8:-8], atol=0.2)


def test_a_fit_moves_the_past_to_tau_of_its_time_and_no_further():
    signal = infinity.Signal(segment_length=256, basis=256, samples=256, tau=0.75, sticky=False)
    memory, none = infinity.LongTermMemory(SIZES, signal), np.zeros((256, 1))
    t, sampled = np.linspace(0, 1, 4001), memory.sample(jnp.zeros((1, infinity.BINS)))
    read = np.asarray(sampled)[0].astype(np.float64)
    bump = lambda place: np.exp(-((infinity.middles(256)[:, None] - place) ** 2) / 0.005)

    def place(coefficients):
        seen = (signal.psi(t) @ coefficients)[:, 0]
        return (t * seen).sum() / seen.sum()

    coefficients = signal.first @ bump(0.8)
    for fits in range(1, 4):
        coefficients = signal.again @ np.concatenate([signal.psi(read) @ coefficients, none])
        assert place(coefficients) == pytest.approx(0.8 * 0.75**fits, abs=1e-4)
    new = signal.again @ np.concatenate([none, bump(0.4)])
    assert place(new) == pytest.approx(0.75 + 0.25 * 0.4, abs=1e-4)


def test_samples_lie_where_the_attention_was():
    memory = infinity.LongTermMemory(SIZES, infinity.Signal(segment_length=8, basis=8, samples=50))
    density = np.zeros((2, infinity.BINS), np.float32)
    density[0, 32:64], density[0, 96:] = 3.0, 1.0
    times = np.asarray(memory.sample(jnp.array(density)))
    assert (np.diff(times[0]) > 0).all()
    inside = (times[0] >= 0.25) & (times[0] <= 0.5)
    assert inside.mean() == pytest.approx(0.75, abs=0.03)
    np.testing.assert_allclose(times[1], (np.arange(50) + 0.5) / 50, atol=1e-6)


def test_the_size_of_gpt2_is_the_published_one():
    shapes = jax.eval_shape(gpt2.make(gpt2.Sizes(vocabulary=50257)).init, KEY)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 124_439_808


def test_the_first_segment_of_a_memoria_transformer_is_gpt2():
    model = MODELS["memoria"]
    params, (tokens, mask) = noisy(model.init), streams(KEY, 3, 2)
    first, state, _ = model.step(params, model.init_state(params, 3), tokens[:, 0], mask[:, 0])
    plain = jax.tree.map(lambda x: x, params)
    for name in ("h_0", "h_1"):
        memory = ("memory_attn", "ln_working_memory_attn", "ln_memory_attn")
        plain[name] = {part: values for part, values in params[name].items() if part not in memory}
    gpt = MODELS["transformer"]
    plain.pop("abstractor")
    hidden = gpt.step(plain, gpt.init_state(plain, 3), tokens[:, 0], mask[:, 0])[0]
    np.testing.assert_allclose(first, hidden, atol=1e-6)
    # The first segment has nothing to remember, so Memoria makes no step.
    assert not (state.engrams.kind != memoria.EMPTY).any()
    second, after, _ = model.step(params, state, tokens[:, 1], mask[:, 1])
    assert ((after.engrams.kind == memoria.SHORT_TERM).sum(1) == ENGRAMS.working).all()


def norm(x, p):
    spread = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return (x - x.mean(-1, keepdims=True)) / spread * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"].T + p["bias"]


def look(q, k, v, seen):
    """Attention of two heads; returns the output and the weights [B, 2, N, M]."""
    q, k, v = (y.reshape(*y.shape[:-1], 2, 8) for y in (q, k, v))
    scores = np.einsum("bnhe,bmhe->bhnm", q, k) / np.sqrt(8)
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1)
    return jnp.einsum("bhnm,bmhe->bnhe", weights, v).reshape(*q.shape[:2], -1), weights


def test_attended_engrams_live_on():
    """The engrams after a step are those of `memoria.step` with weights computed by hand."""
    model = MODELS["memoria"]
    params, (tokens, mask) = noisy(model.init), streams(KEY, 2, 6)
    state = model.init_state(params, 2)
    for t in range(5):
        _, state, _ = model.step(params, state, tokens[:, t], mask[:, t])
    _, after, _ = model.step(params, state, tokens[:, 5], mask[:, 5])
    abstractor = {"params": params["abstractor"]}
    working = Abstractor(ENGRAMS.working).apply(abstractor, state.hidden, state.mask)
    remind = jax.jit(jax.vmap(lambda s, w: memoria.remind(ENGRAMS, s, w)))
    between, reminded = remind(state.engrams, working)
    assert reminded.valid.any(1).all()
    x, looked = params["wte"][tokens[:, 5]] + params["wpe"], []
    for i in range(2):
        p = params[f"h_{i}"]
        q, k, v = jnp.split(dense(norm(x, p["ln_1"]), p["attn"]["c_attn"]), 3, -1)
        x = x + dense(look(q, k, v, np.tri(N, dtype=bool))[0], p["attn_c_proj"])
        for name, rows, seen in (
            ("ln_working_memory_attn", working, True),
            ("ln_memory_attn", reminded.engrams, reminded.valid[:, None, None]),
        ):
            k, v = jnp.split(dense(rows, p["memory_attn"]["c_attn"]), 2, -1)
            out, weights = look(dense(norm(x, p[name]), p["memory_attn"]["q_attn"]), k, v, seen)
            x = x + dense(out, p["memory_attn"]["c_proj"])
        looked.append(weights.mean((1, 2)))
        x = x + dense(jax.nn.gelu(dense(norm(x, p["ln_2"]), p["mlp"]["c_fc"])), p["mlp"]["c_proj"])
    finish = jax.jit(jax.vmap(lambda s, r, w: memoria.memorize_and_forget(ENGRAMS, s, r, w)))
    expected = finish(between, reminded, sum(looked) / 2)
    for name in ("kind", "serial", "lifespan", "counts"):
        np.testing.assert_allclose(getattr(after.engrams, name), getattr(expected, name), atol=1e-4)


def test_impossible_values_are_named():
    with pytest.raises(ValueError, match="width 10 is not a multiple of heads 3"):
        gpt2.Sizes(vocabulary=5, dim=10, heads=3)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        gpt2.Sizes(vocabulary=5, layers=0)
    with pytest.raises(ValueError, match="basis must be a multiple of 2, got 5"):
        infinity.Signal(segment_length=4, basis=5, samples=4)
    with pytest.raises(ValueError, match="tau must lie between 0 and 1, got 1"):
        infinity.Signal(segment_length=4, basis=4, samples=4, tau=1)
    model, (tokens, mask) = MODELS["transformer"], streams(KEY, 1, 3)
    with pytest.raises(ValueError, match=r"silent must be one of 0 .. 2, got 3"):
        unroll(model, {}, (), tokens, mask, lambda hidden, _: hidden, silent=3)
