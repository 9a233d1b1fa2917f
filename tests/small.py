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
from tests import decayed  # noqa: F401  a machine of somebody else's

ITEMS, N, DIM = 50, 4, 8
SLOTS = {"dim": DIM, "slots": 4, "layers": 1, "heads": 2, "segment_length": N, "dropout": 0.5}
MACHINES = {  # name -> kind, settings
    "rehearsal": ("rehearsal", SLOTS),
    "rehearsal-bigru": (
        "rehearsal",
        SLOTS | {"encoder": "bigru", "normalize": "items", "slot_identity": True},
    ),
    "continual": ("continual", SLOTS | {"subspaces": 2, "slot_dim": 6}),
    "gru": ("gru", {"dim": DIM}),
    "buffer": ("buffer", {"dim": DIM, "buffer_length": 3 * N, "recent": 5}),
    "directly_reason": ("directly_reason", {"dim": DIM, "buffer_length": 4 * N}),
    "decayed": (
        "decayed",
        {"dim": DIM, "decay": 0.9},
    ),  # registered by the import below, from outside the package
    "multihop_reason": ("multihop_reason", {"dim": DIM, "buffer_length": 3 * N, "hops": 2}),
}


class Small(NamedTuple):
    machine: MemoryMachine
    params: Any
    run: Callable  # jitted memorize(params, items, mask, memory, key, positions)
    exact: Callable  # the same, as optimised elsewhere: what must be bitwise equal is
    learn: Callable  # jitted (params, items, mask, query, key) -> loss, gradient


def noise(init: Callable, seed: int = 0) -> Any:
    """Random parameters of the shapes `init(key)` has: no bias is zero, no norm is the identity."""
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype), shapes)


def answers(machine: MemoryMachine, params, items, mask, query, key=None, **how):
    memory = machines.memorize(machine, params, items, mask, key=key, **how).memory
    return machine.read(params, memory, machine.embed(params, query), jnp.ones(query.shape, bool))


@functools.cache
def small(name: str, **how) -> Small:
    """The machine of this row; `how` = block, remat."""
    kind, settings = MACHINES[name]
    machine = machines.make(kind, ITEMS, **settings)
    loss = lambda params, *data: jnp.sin(answers(machine, params, *data, **how)).sum()
    run = functools.partial(machines.memorize, machine, **how)
    exact = jax.jit(run, compiler_options={"xla_backend_optimization_level": 3})
    return Small(
        machine, noise(machine.init), jax.jit(run), exact, jax.jit(jax.value_and_grad(loss))
    )


def stream(seed: int = 0, batch: int = 3, segments: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Items and mask [B, T, N] with holes; row 0 has an empty segment inside."""
    rng = np.random.default_rng(seed)
    items, mask = (
        rng.integers(0, ITEMS, (batch, segments, N)),
        rng.random((batch, segments, N)) < 0.8,
    )
    mask[0, segments // 2] = False
    return items.astype(np.int32), mask


def keys(batch: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), batch)


def batch(
    seed: int = 0, batch: int = 4, segments: int = 8, queries: int = 2, position: bool = False
) -> Batch:
    """Row 1 is a short stream, row 2 has one query less; the items of row b, and its negatives, never meet."""
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
    """A decoder that keeps what it was last given: the traced values, to be returned by the function being traced."""

    def __init__(self, decoder: Decoder):
        self.decoder, self.init, self.seen = decoder, decoder.init, {}

    def __call__(self, params, x, mask, hidden, slots, slot_mask, key=None):
        self.seen = {
            "x": x,
            "mask": mask,
            "hidden": hidden,
            "slots": slots,
            "key": jax.random.key_data(key),
        }
        return self.decoder(params, x, mask, hidden, slots, slot_mask, key)


def rehearsal(decoder=None, **settings) -> Rehearsal:
    decoder = decoder or Decoder(Transformer(1, 2, settings.pop("dropout", 0.5)))
    return Rehearsal(decoder, **({"fragments": 4, "sampled_items": 6} | settings))


def recommendation(
    machine: MemoryMachine, losses: Rehearsal | None = None, **settings
) -> Reasoning:
    return Reasoning(machine, Answers(Questions(), DIM, DIM), losses or rehearsal(), N, **settings)


def teacher() -> tuple[Teacher, Any]:
    """The history sampler's task and parameters; its 'sampler' entry is what a student takes as frozen."""
    task = Teacher(ITEMS, Answers(Questions(), DIM, DIM))
    return task, noise(task.init, 7)
