"""The gated delta rule, Titans, and fast and forgetful memory against their step forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax import machines
from rmjax.layers import norms
from rmjax.machines import gated_delta, titans
from tests.oracles import close, f64
from tests.oracles import ffm as ffm_oracle
from tests.oracles import gated_delta as delta_oracle
from tests.oracles import titans as titans_oracle
from tests.small import small, stream

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def written(name):
    """Returns the machine's parameters in f64, a stream with holes, its memory, and answers."""
    case, data = small(name), stream()
    memory = case.run(case.params, *data).memory
    query = normal(3, 2, 8)
    read = jax.jit(case.machine.read)
    answers = read(case.params, memory, query, np.ones((3, 2), bool))
    slots, mask = case.machine.slots(case.params, memory)
    assert mask.all()
    # The slots are the answers to the learned questions.
    asked = np.concatenate([query, np.broadcast_to(case.params["slots"], slots.shape)], 1)
    answers = np.concatenate([answers, slots], 1)
    return f64(case.params), zip(*data, strict=True), memory, f64(asked), answers


def test_the_gated_delta_rule_in_chunks_is_its_step_form():
    params, rows, memory, asked, answers = written("gated_delta")
    for row, (items, mask) in enumerate(rows):
        states = delta_oracle.memorize(params, items, mask, heads=2)
        close(memory.state[row], states)
        for query, answer in zip(asked[row], answers[row], strict=True):
            close(answer, delta_oracle.read(params, states, query))


def test_the_network_of_titans_in_chunks_is_its_step_form():
    params, rows, memory, asked, answers = written("titans")
    for row, (items, mask) in enumerate(rows):
        weights, momentum = titans_oracle.memorize(params, items, mask, chunk=3, rate=0.1)
        for layer in range(2):
            close(memory.state.weights[layer][row], weights[layer])
            close(memory.state.momentum[layer][row], momentum[layer])
        for query, answer in zip(asked[row], answers[row], strict=True):
            close(answer, titans_oracle.read(params, weights, query))


def test_fading_traces_in_segments_are_their_step_form():
    params, rows, memory, asked, answers = written("ffm")
    for row, (items, mask) in enumerate(rows):
        z = ffm_oracle.memorize(params, items, mask)
        close(memory.traces[row], [z.real, z.imag])
        for query, answer in zip(asked[row], answers[row], strict=True):
            close(answer, ffm_oracle.read(params, z, query))


def test_orthonormal_keys_are_stored_exactly():
    """With a = b = 1 every value is under its key, also one that replaces an earlier value."""
    keys = np.linalg.qr(normal(6, 6))[0].astype(np.float32)
    k, v = np.concatenate([keys, keys[:2]])[None, :, None], normal(1, 8, 1, 6)
    ones = np.ones((1, 8, 1), np.float32)
    state = gated_delta.write(jnp.zeros((1, 1, 6, 6)), k, v, (0 * ones, ones))
    close(gated_delta.look_up(state, k[:, 2:]), v[:, 2:])
    close(gated_delta.look_up(state, k[:, :2]), v[:, 6:])


def test_one_layer_without_momentum_and_forgetting_is_the_delta_rule():
    """A step theta = b / 2 with keys of unit length."""
    weights, b = normal(2, 6, 6), RNG.random((2, 5)).astype(np.float32)
    k, v = norms.unit(normal(2, 5, 1, 6)), normal(2, 5, 1, 6)
    network = titans.Network((weights,), (0 * weights,))
    matrix = weights.swapaxes(1, 2)[:, None]
    every = gated_delta.write(matrix, k, v, (0 * b[..., None], b[..., None]))
    for t in range(5):
        one = slice(t, t + 1)
        gates = titans.factors(b[:, one] / 2, 0 * b[:, one], 0 * b[:, one], b[:, one] >= 0)
        network = titans.write(titans.recall, network, k[:, one], v[:, one], gates)
    close(network.weights[0].swapaxes(1, 2), every[:, 0])


def test_a_masked_item_is_the_identity_in_both_scans():
    theta, eta, alpha = RNG.random((3, 1, 7)).astype(np.float32)
    mask = np.array([[1, 1, 0, 1, 0, 1, 0]], bool)
    holes = titans.factors(theta, eta, alpha, mask)
    dense = titans.factors(*(x[mask][None] for x in (theta, eta, alpha)), np.ones((1, 4), bool))
    for got, expected in zip(holes, dense, strict=True):
        close(got[mask], expected[0])
    assert not holes.to_weights[~mask].any() and not holes.to_momentum[~mask].any()


def test_a_segment_stores_no_power_for_each_item():
    machine = machines.make("ffm", 10, dim=8, traces=16, contexts=8, segment_length=20)
    shapes = [jax.ShapeDtypeStruct((8, 10, 20), dtype) for dtype in (np.int32, bool)]
    loss = lambda p, *data: jnp.square(machine.encode(p, *data)).sum()
    params = jax.eval_shape(machine.init, jax.random.key(0))
    learn = jax.jit(jax.grad(loss)).lower(params, *shapes).compile()
    powers = 4 * 8 * 10 * 20 * 2 * 16 * 8  # bytes, if each item had its own
    assert learn.memory_analysis().temp_size_in_bytes < powers


def test_traces_that_neither_fade_nor_turn_are_sums():
    case, (items, mask) = small("ffm"), stream()
    params = case.params | {name: 0 * case.params[name] for name in ("decay", "angle")}
    traces = case.run(params, items, mask).memory.traces
    x = case.machine.embed(params, items)
    added = jax.nn.sigmoid(x @ params["item_gate"]) * (x @ params["item"])
    close(traces[:, 0], (added * mask[..., None]).sum((1, 2))[..., None].repeat(3, -1))
    assert not traces[:, 1].any()


@pytest.mark.parametrize("repeats", [1, 20])
def test_titans_stays_bounded_where_items_repeat(repeats):
    """The gradients of a chunk add up, so a step that suits one item may be too large for many."""
    machine = machines.make("titans", 50, dim=16, segment_length=20, rate=4.0)
    items = RNG.integers(0, 50, (2, 100, 20 // repeats)).repeat(repeats, 2).astype(np.int32)
    run = jax.jit(lambda p: machines.memorize(machine, p, items, np.ones(items.shape, bool)).memory)
    state = run(machine.init(jax.random.key(0))).state
    assert all(np.abs(w).max() < 100 for w in state.weights)
