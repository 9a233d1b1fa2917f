"""Draws, gradients and training are the same on 1, 2, 4 and 8 devices, by pmap and by mesh."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rmjax import machines
from rmjax.io.cost import collectives, tree_bytes
from rmjax.layers.transformer import Transformer
from rmjax.rehearsal.decoder import Decoder
from rmjax.run.mapping import make_mapped
from rmjax.run.step import TrainState, make_train_step
from rmjax.tasks.reasoning import Teacher
from tests.small import ITEMS, SLOTS, Spy, batch, noise, recommendation, rehearsal, teacher

EXAMPLES = 8
OTHERS = (("pmap", 1), ("pmap", 2), ("pmap", 4), ("mesh", 2), ("mesh", 8))
SLOW = [pytest.param(*how, marks=pytest.mark.slow) for how in OTHERS]
MAPPINGS = [("pmap", 8), *SLOW]  # compared with a mesh of one device
pytestmark = pytest.mark.skipif(
    jax.local_device_count("cpu") < 8, reason="needs eight simulated devices"
)


def gradients() -> optax.GradientTransformation:
    """An optimizer that keeps the gradient as its state and moves no parameter."""
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    return optax.GradientTransformation(zeros, lambda grads, state, params: (zeros(grads), grads))


def split(tree, devices: int):
    return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), tree)


def mapped(function, kind: str, devices: int):
    """Maps function(replicated, sharded, axis) -> (replicated, sharded) over devices."""
    chosen = jax.devices("cpu")[:devices]
    if kind == "pmap":
        on_one = lambda *x: function(*x, "data")
        axes = dict(in_axes=(None, 0), out_axes=(None, 0))
        run = jax.pmap(on_one, "data", **axes, devices=chosen)
        join = lambda x: x.reshape(-1, *x.shape[2:])

        def call(replicated, sharded):
            first, second = run(replicated, split(sharded, devices))
            return first, jax.tree.map(join, second)

        return call
    mesh = jax.sharding.Mesh(np.array(chosen), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("data"))
    run = jax.jit(lambda *x: function(*x, None), out_shardings=(everywhere, rows))
    put = jax.device_put
    return lambda first, second: run(put(first, everywhere), put(second, rows))


def build():
    """Returns a task and its decoder's spy. Padding is uneven, so a mean of means is wrong."""
    settings = SLOTS | {"slots": 3, "dropout": 0.5}
    decoder = Spy(Decoder(Transformer(1, 2, 0.5)))
    machine = machines.make("rehearsal", ITEMS, **settings)
    return recommendation(machine, rehearsal(decoder, fragments=2)), decoder


def start(task, optimizer, dtype=jnp.float32) -> TrainState:
    params = jax.tree.map(lambda x: x.astype(dtype), noise(task.init))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


@functools.cache
def one_step(kind: str, devices: int, microbatch: int = 0):
    """Returns (state with the gradient, metrics) and all draws, from one compilation.

    microbatch: rows that a device holds at once; 0: all.
    """
    task, spy = build()
    frozen = teacher()[1]["sampler"]

    def step(state, data, axis):
        rows = microbatch * (1 if axis else devices)
        pieces = (lambda streams, items: rows) if rows else None
        train_step = make_train_step(task, gradients(), 0, axis, pieces)
        after, _, metrics = train_step(state, (), frozen, data)
        key = jax.random.fold_in(jax.random.key(0), state.step)
        task.losses(state.params, frozen, (), data, key)
        return (after, metrics), spy.seen

    return mapped(step, kind, devices)(start(task, gradients()), batch(batch=EXAMPLES))


@pytest.mark.parametrize(("kind", "devices"), MAPPINGS)
def test_everything_drawn_is_bitwise_equal(kind, devices):
    drawn, expected = one_step(kind, devices)[1], one_step("mesh", 1)[1]
    for name in expected:
        # Slots are computed, with the dropout of the encoder in them. All else is drawn.
        atol = 1e-5 if name == "slots" else 0
        np.testing.assert_allclose(drawn[name], expected[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize(("kind", "devices"), MAPPINGS)
def test_the_first_gradients_agree(kind, devices):
    got, expected = one_step(kind, devices)[0], one_step("mesh", 1)[0]
    leaves = jax.tree.leaves(expected[0].opt_state["machine"]["attention"])
    assert all(np.abs(x).max() > 1e-4 for x in leaves)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "devices", "microbatch"),
    [("pmap", 2, 1), ("mesh", 2, 2), ("mesh", 1, 2), ("pmap", 1, 4)],
)
def test_a_step_by_microbatches_is_the_same_step(kind, devices, microbatch):
    got, expected = one_step(kind, devices, microbatch), one_step("mesh", 1)
    chex.assert_trees_all_close(got[0], expected[0], rtol=1e-5, atol=1e-6)


# The same laws for `make_mapped`, with split tables and layers, and with sparse steps.
# tests/drills/test_pods.py repeats them with several processes.

DENSE, SPARSE, SPLIT = {}, {"sparse_items": True}, {"sparse_items": True, "split_layers": True}
LAID = {  # name -> mapping, devices, model devices, further arguments
    "pmap 8, sparse": ("pmap", 8, 1, SPARSE),
    "mesh 2x4, sparse, split": ("mesh", 8, 4, SPLIT),
    "pmap 2": ("pmap", 2, 1, DENSE),
    "pmap 4": ("pmap", 4, 1, DENSE),
    "pmap 8": ("pmap", 8, 1, DENSE),
    "mesh 8x1": ("mesh", 8, 1, DENSE),
    "mesh 2x4": ("mesh", 8, 4, DENSE),
    "mesh 1x8": ("mesh", 8, 8, DENSE),
    "mesh 8x1, sparse": ("mesh", 8, 1, SPARSE),
    "mesh 1x8, sparse": ("mesh", 8, 8, SPARSE),
    "mesh 4x2, split": ("mesh", 8, 2, {"split_layers": True}),
}
FAST = ("pmap 8, sparse", "mesh 2x4, sparse, split")
MANY = 1024  # items, several times as many as a batch has


def lay(optimizer, mapping: str, devices: int, model: int = 1, dtype=jnp.float32, **how):
    """Returns a task's mapped steps; its state and its teacher on the host."""
    settings = SLOTS | {"slots": 3, "dropout": 0.5, "dim": 8, "heads": 4, "dtype": dtype}
    decoder = Decoder(Transformer(1, 4, 0.5, dtype))
    task = recommendation(machines.make("rehearsal", MANY, **settings), rehearsal(decoder))
    frozen = noise(Teacher(MANY, teacher()[0].answers).init, 7)["sampler"]
    mapped = make_mapped(
        task, optimizer, 0, mapping=mapping, devices=devices, model_devices=model, **how
    )
    return mapped, *jax.device_get((start(task, optimizer, dtype), frozen))


@functools.cache
def first_step(*layout, **how):
    """Returns the gradients (as the optimizer's state) and metrics of one step."""
    mapped, state, frozen = lay(gradients(), *layout, **how)
    after, _, metrics = mapped.train_step(
        mapped.put(state), (), mapped.put(frozen), batch(batch=EXAMPLES)
    )
    return mapped.get((after.opt_state, metrics))


def compiled(*layout, **how):
    """Returns the compiled step and the task's state."""
    mapped, state, frozen = lay(gradients(), *layout, **how)
    return mapped.compiled(state, (), frozen, batch(batch=EXAMPLES)), state


def laid(*fast: str) -> list:
    """The layouts; all but the fast ones are marked as slow."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in LAID]


@pytest.mark.parametrize("name", laid(*FAST))
def test_gradients_are_the_same_however_parameters_lie(name):
    *layout, how = LAID[name]
    got, expected = first_step(*layout, **how), first_step("pmap", 1)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_pmap_step_sends_the_gradients_once_and_little_else():
    """A sparse step sends the gradients of the rows that its batch touches."""
    data = batch(batch=EXAMPLES)
    ids = data.items.size + data.negative_items.size + 2 * EXAMPLES + 8 * 6
    for how, rows in ((DENSE, MANY), (SPARSE, None)):
        program, state = compiled("pmap", 8, **how)
        sizes = sorted(size for _, size in collectives(program))
        params, table = tree_bytes(state.params), 4 * 8 * MANY
        expected = params if rows else params - table + 4 * 8 * ids
        assert 0.98 * expected < sizes[-1] <= expected + 64
        assert sum(sizes[:-1]) < 4 * ids + 200  # the ids of the rows, and a few numbers


def test_a_step_never_assembles_a_split_table():
    program, _ = compiled("mesh", 8, 4, **SPLIT)
    table = f"f32[{MANY},8]"
    assert table not in program.as_text() and f"f32[{MANY // 4},8]" in program.as_text()
    large = {name for name, size in collectives(program) if size >= 4 * 8 * MANY // 4}
    assert "all-gather" not in large


@functools.cache
def fifty_steps(*layout, **how):
    """Returns parameters and losses [50]. Five batches alternate; a process has a slice of each."""
    with jax.enable_x64(True):
        mapped, state, frozen = lay(optax.adam(1e-2), *layout, dtype=jnp.float64, **how)
        rows = EXAMPLES // jax.process_count()
        mine = slice(rows * jax.process_index(), rows * (jax.process_index() + 1))
        batches = [
            jax.tree.map(lambda x: np.asarray(x)[mine], batch(seed, EXAMPLES)) for seed in range(5)
        ]
        state, frozen, losses = mapped.put(state), mapped.put(frozen), []
        for step in range(50):
            state, _, metrics = mapped.train_step(state, (), frozen, batches[step % 5])
            losses.append(metrics["loss"])
        return mapped.get((state.params, losses))


@pytest.mark.parametrize("name", laid("pmap 8"))
def test_fifty_steps_agree_in_double_precision(name):
    *layout, how = LAID[name]
    expected = fifty_steps("pmap", 1, sparse_items=how.get("sparse_items", False))
    assert expected[0]["machine"]["slots"].dtype == np.float64 and expected[1][-1] < expected[1][0]
    chex.assert_trees_all_close(fifty_steps(*layout, **how), expected, rtol=0, atol=1e-8)
