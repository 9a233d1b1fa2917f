"""The one table of machines under test, and small random data for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmjax import machines
from rmjax.data.source import Questions
from rmjax.layers.transformer import Transformer
from rmjax.rehearsal.decoder import Decoder
from rmjax.tasks.answers import Answers
from rmjax.tasks.reasoning import Reasoning, Teacher
from rmjax.tasks.rehearsing import Rehearsal
from rmjax.types import Batch, MemoryMachine
from tests import decayed  # noqa: F401  registers a machine from outside the package

ITEMS, N, DIM = 50, 4, 8
SLOTS = {"dim": DIM, "slots": 4, "layers": 1, "heads": 2, "segment_length": N, "dropout": 0.5}
MACHINES = {  # name -> kind, settings
    "rehearsal": ("rehearsal", SLOTS),
    "rehearsal-bigru": (
        "rehearsal",
        SLOTS | {"encoder": "bigru", "normalize": "items", "slot_identity": True},
    ),
    "rehearsal-fused": ("rehearsal", SLOTS | {"fused": "on"}),
    "continual": ("continual", SLOTS | {"subspaces": 2, "slot_dim": 6}),
    "gru": ("gru", {"dim": DIM}),
    "buffer": ("buffer", {"dim": DIM, "buffer_length": 3 * N, "recent": 5, "before": 1}),
    "directly_reason": ("directly_reason", {"dim": DIM, "buffer_length": 4 * N}),
    "decayed": ("decayed", {"dim": DIM, "decay": 0.9}),  # from outside, see tests/decayed.py
    "stm": ("stm", {"dim": DIM, "slots": 4, "queries": 2, "retention": 0.5}),
    "hpmn": ("hpmn", {"dim": DIM, "levels": 3, "reader": "own", "hops": 2}),
    "mimn": ("mimn", {"dim": DIM, "slots": 4, "reader": "own", "max_items": 40}),
    "gated_delta": ("gated_delta", {"dim": DIM, "heads": 2, "slots": 4, "chunk": 3}),
    "titans": ("titans", {"dim": DIM, "slots": 4, "chunk": 3, "rate": 0.1}),
    "ffm": ("ffm", {"dim": DIM, "slots": 4, "traces": 6, "contexts": 3}),
    "multihop_reason": ("multihop_reason", {"dim": DIM, "buffer_length": 3 * N, "hops": 2}),
    "dnc": ("dnc", {"dim": DIM, "slots": 4, "read_heads": 2}),
    "nutm": ("nutm", {"dim": DIM, "slots": 4, "read_heads": 2, "programs": 2}),
    "dmsdnc": ("dmsdnc", {"dim": DIM, "slots": 4, "read_heads": 2, "refresh_rate": 0.5}),
    "compressive": ("compressive", SLOTS | {"compression": 3}),
    "rmt": ("rmt", SLOTS),
}


class Small(NamedTuple):
    machine: MemoryMachine
    params: Any
    run: Callable  # jitted memorize(params, items, mask, memory, key, positions)
    exact: Callable  # the same at full optimisation, for tests of bitwise equality
    learn: Callable  # jitted (params, items, mask, query, key) -> loss, gradient
    read: Callable  # jitted machine.read


def noise(init: Callable, seed: int = 0) -> Any:
    """Draws parameters in the shapes of `init(key)`: no bias is zero, no norm is the identity."""
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype), shapes)


def answers(machine: MemoryMachine, params, items, mask, query, key=None, **how):
    memory = machines.memorize(machine, params, items, mask, key=key, **how).memory
    return machine.read(params, memory, machine.embed(params, query), jnp.ones(query.shape, bool))


@functools.cache
def small(name: str, **how) -> Small:
    """Builds the machine of a row of MACHINES; `how` = block, remat."""
    kind, settings = MACHINES[name]
    machine = machines.make(kind, ITEMS, **settings)
    loss = lambda params, *data: jnp.sin(answers(machine, params, *data, **how)).sum()
    run = functools.partial(machines.memorize, machine, **how)
    exact = jax.jit(run, compiler_options={"xla_backend_optimization_level": 3})
    learn = jax.jit(jax.value_and_grad(loss))
    return Small(machine, noise(machine.init), jax.jit(run), exact, learn, jax.jit(machine.read))


def stream(seed: int = 0, batch: int = 3, segments: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Draws items and mask [B, T, N] with holes; row 0 has an empty segment inside."""
    rng = np.random.default_rng(seed)
    shape = batch, segments, N
    items, mask = rng.integers(0, ITEMS, shape), rng.random(shape) < 0.8
    mask[0, segments // 2] = False
    return items.astype(np.int32), mask


def keys(batch: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), batch)


def batch(
    seed: int = 0, batch: int = 4, segments: int = 8, queries: int = 2, position: bool = False
) -> Batch:
    """Draws a batch.

    Row 1 is a short stream, and row 2 has one query less. No item of a row is among its negatives.
    """
    rng = np.random.default_rng(seed)
    items, mask = stream(seed, batch, segments)
    mask[1 % batch, 2:] = False
    query_mask = np.ones((batch, queries), bool)
    query_mask[2 % batch, 1:] = False
    made = Batch(
        items=items % (ITEMS - 10),
        item_mask=mask,
        query=rng.integers(0, ITEMS, (batch, queries)),
        query_mask=query_mask,
        target=rng.integers(0, 2, (batch, queries)),
        negative_items=rng.integers(ITEMS - 10, ITEMS, (batch, 5)),
        negative_mask=np.arange(5) < rng.integers(1, 6, (batch, 1)),
        example_id=np.arange(batch) + 100,
        position=rng.integers(0, segments + 1, (batch, queries)) if position else None,
    )
    return jax.tree.map(lambda x: jnp.asarray(x, bool if x.dtype == bool else jnp.int32), made)


class Spy:
    """A decoder that keeps its last arguments.

    They are traced values, so the traced function must return them.
    """

    def __init__(self, decoder: Decoder):
        self.decoder, self.init, self.seen = decoder, decoder.init, {}

    def __call__(self, params, x, mask, hidden, slots, slot_mask, key=None):
        self.seen = {"x": x, "mask": mask, "hidden": hidden, "slots": slots}
        self.seen["key"] = jax.random.key_data(key)
        return self.decoder(params, x, mask, hidden, slots, slot_mask, key)


def rehearsal(decoder=None, **settings) -> Rehearsal:
    decoder = decoder or Decoder(Transformer(1, 2, settings.pop("dropout", 0.5)))
    return Rehearsal(decoder, **({"fragments": 4, "sampled_items": 6} | settings))


def recommendation(
    machine: MemoryMachine, losses: Rehearsal | None = None, **settings
) -> Reasoning:
    return Reasoning(machine, Answers(Questions(), DIM, DIM), losses or rehearsal(), N, **settings)


def teacher() -> tuple[Teacher, Any]:
    """Returns the task of the history sampler and its parameters.

    A student takes the entry 'sampler' as its frozen parameters.
    """
    task = Teacher(ITEMS, Answers(Questions(), DIM, DIM))
    return task, noise(task.init, 7)
