"""The Compressive Transformer and the Recurrent Memory Transformer as memories of slots."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax import machines
from rmjax.layers import compressive
from rmjax.layers.relative import RelativeBlock
from rmjax.machines import memorize
from tests import oracles
from tests.oracles import f64
from tests.oracles import slotmem as oracle
from tests.small import ITEMS, N, noise, small, stream

close = functools.partial(oracles.close, rtol=1e-4, atol=2e-5)
SIZES = {"dim": 8, "slots": 4, "layers": 2, "heads": 2, "segment_length": N}


@functools.cache
def compressor(compression=3):
    machine = machines.make("compressive", ITEMS, **SIZES, compression=compression)
    run = jax.jit(functools.partial(memorize, machine))
    return machine, noise(machine.init), run


def transparent(params):
    """Layers that add nothing, and compressions that take the mean."""
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    layers = {
        name: layer | {"attention": zeros(layer["attention"]), "narrow": zeros(layer["narrow"])}
        for name, layer in params["layers"].items()
    }
    rows, dim = params["compression"][0]["kernel"].shape
    kernel = jnp.tile(jnp.eye(dim), (rows // dim, 1)) * dim / rows
    mean = {"kernel": kernel, "bias": jnp.zeros(dim)}
    norm = {"scale": jnp.ones(dim), "bias": jnp.zeros(dim)}
    mean_of_all = [mean] * len(params["compression"])
    return params | {"layers": layers, "compression": mean_of_all, "norm": norm}


def test_a_recurrent_memory_transformer_follows_its_equations():
    case, (items, mask) = small("rmt"), stream()
    memory = case.run(case.params, items, mask).memory
    for row in range(3):
        close(memory.slots[row], oracle.rmt(f64(case.params), items[row], mask[row], 2))


def test_a_compressive_memory_follows_its_equations():
    """Segments of four items, three to a slot: the rate does not divide the length."""
    machine, params, run = compressor()
    items, mask = stream(segments=5)
    mask[2, 1:] = False  # a stream whose queues stay partly empty
    memory, _, aux = run(params, items, mask)
    rows, seen = machine.slots(params, memory)
    total = np.zeros(2)
    for row in range(3):
        own = f64(params), items[row], mask[row]
        slots, lost = oracle.compressive(*own, heads=2, rate=3, size=4)
        close(rows[row][seen[row]], slots)
        total += lost
    assert seen[2].sum() < 4 and total[1] > 0
    close(aux, total, atol=1e-3)


def test_the_first_segment_is_read_by_a_plain_transformer():
    machine, params, run = compressor()
    items, mask = stream(segments=1)
    block, x = RelativeBlock(2, causal=False, prenorm=True), machine.embed(params, items[:, 0])
    nothing = jnp.zeros((3, 0, 8)), jnp.zeros((3, 0), bool)
    apply = jax.jit(lambda layer, x: block.apply({"params": layer}, x, mask[:, 0], *nothing))
    for layer in params["layers"].values():
        x = apply(layer, x)
    memory = run(params, items, mask).memory
    for row in (1, 2):  # row 0 has no item
        outputs = oracle.norm(f64(params["norm"]), f64(x[row]))[mask[row, 0]]
        expected = oracle.compress(f64(params["compression"][-1]), list(outputs), 3)
        rows, seen = machine.slots(params, memory)
        close(rows[row][seen[row]], expected)


@pytest.mark.parametrize("segments, length, slots, rate", [(20, 10, 20, 5), (5, 4, 3, 2)])
def test_slots_are_the_means_of_the_latest_items(segments, length, slots, rate):
    """Through layers that add nothing, slots hold the last K * rate items, the oldest first."""
    sizes = SIZES | {"slots": slots, "segment_length": length, "compression": rate}
    machine = machines.make("compressive", 400, **sizes)
    params = transparent(noise(machine.init))
    items = np.random.default_rng(0).permutation(400)[: segments * length].astype(np.int32)
    shaped = items.reshape(1, segments, length)
    memory = jax.jit(functools.partial(memorize, machine))(params, shaped, shaped >= 0).memory
    x = oracle.norm(f64(params["norm"]), f64(machine.embed(params, items[-slots * rate :])))
    rows, seen = machine.slots(params, memory)
    assert seen.all()
    close(rows[0], x.reshape(slots, rate, 8).mean(1))


def test_only_the_layers_compressions_learn_to_reconstruct():
    machine, params, _ = compressor()
    items, mask = stream()
    learn = jax.jit(jax.grad(lambda p: memorize(machine, p, items, mask).aux[0]))
    grads = learn(params)
    *inner, top = grads.pop("compression")
    assert machine.has_loss
    assert all(np.abs(leaf).max() > 0 for part in inner for leaf in jax.tree.leaves(part))
    assert not any(np.abs(leaf).max() for leaf in jax.tree.leaves((grads, top)))


def test_gradients_may_stop_between_segments():
    """With `gradient_segments = 1` only the items of the last segment get gradients."""
    machine, params = small("compressive")[:2]
    items = np.arange(16, dtype=np.int32).reshape(1, 4, 4)

    @functools.partial(jax.jit, static_argnums=1)
    def learn(params, segments):
        def loss(p):
            memory = memorize(machine, p, items, items >= 0, gradient_segments=segments).memory
            return jnp.sin(machine.slots(p, memory)[0]).sum()

        return jax.grad(loss)(params)["embed"]

    reached = lambda segments: np.abs(learn(params, segments)[:16]).max(1).reshape(4, 4) > 1e-6
    assert reached(0).all()
    assert (reached(1) == (np.arange(4) == 3)[:, None]).all()


def test_an_empty_memory_has_no_slots_and_answers():
    machine, params, _ = compressor()
    memory = machine.init_memory(params, 2)
    assert not machine.slots(params, memory)[1].any()
    query = np.ones((2, 1, 8), np.float32)
    assert np.isfinite(machine.read(params, memory, query, np.ones((2, 1), bool))).all()


def test_a_layer_remembers_a_segment_and_compresses_older_items():
    machine, params, run = compressor(2)
    params = transparent(params)
    items = np.arange(24, dtype=np.int32).reshape(1, 6, 4)
    level = run(params, items, items >= 0).memory.levels[0]
    x = f64(machine.embed(params, items.ravel()))
    close(level.recent.rows[0], x[-4:])
    close(level.old.rows[0], x[-12:-4].reshape(4, 2, 8).mean(1))
    assert isinstance(level, compressive.Compressed) and level.mask.all()


def test_untrained_memory_tokens_differ():
    params = jax.jit(machines.make("rmt", ITEMS, **SIZES).init)(jax.random.key(0))
    assert np.linalg.matrix_rank(params["slots"]) == 4


@pytest.mark.parametrize("kind", ["compressive", "rmt"])
def test_heads_that_do_not_divide_the_width_are_refused(kind):
    with pytest.raises(ValueError, match="heads = 3 must divide dim = 8"):
        machines.make(kind, ITEMS, **SIZES | {"heads": 3})
