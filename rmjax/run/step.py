"""The pure train and evaluation steps: every task, every machine, any mapping over devices."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from rmjax.run import sparse
from rmjax.types import Array, Batch, Key, Params, Task, Terms, at

Pieces = Callable[[int, int], int]


@flax.struct.dataclass
class TrainState:
    step: Array  # i32 [] steps taken = position in the data
    params: Params
    opt_state: Any
    carry: Any = ()  # in checkpoints: what a task that carries remembers, of all streams


def init_state(task: Task, optimizer: optax.GradientTransformation, key: Key) -> TrainState:
    params = task.init(key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    seed: int,
    axis: str | None = None,
    microbatch: Pieces | None = None,
    sparse_items: bool = False,
) -> Callable:
    """-> train_step(state, carry, frozen, batch) -> state, carry, metrics.

    `axis` names the mapped data axis when the step runs once per device; None when it sees the whole batch.
    Every term is a (sum, count), each added over devices and then divided once. metrics: {term: mean} and 'loss'.
    `microbatch(rows, items of a row)`: rows whose activations are held at once, a divisor of all; gradients are summed
    over such pieces, which leaves the step what it is.
    `carry` is per-stream state that outlives a step, () where a task carries nothing.
    sparse_items: of the task's item table the step reads and writes the rows that the batch touches, see `sparse`.
    """
    if sparse_items and not task.table:
        raise ValueError(f"sparse_items: {type(task).__name__} has no item table")
    total = (lambda x: jax.lax.psum(x, axis)) if axis else (lambda x: x)

    def train_step(state: TrainState, carry: Any, frozen: Params, batch: Batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if not sparse_items:
            return step(state, carry, frozen, batch, key, lambda params: params)
        assert task.table
        items = len(at(state.params, task.table))
        ids = sparse.touched(task.item_ids(batch, key, items), items, axis)
        here = functools.partial(sparse.as_table, table=task.table, ids=ids, num_items=items)
        new, carry, metrics = step(
            sparse.take(state, task.table, ids), carry, frozen, batch, key, here
        )
        return sparse.put(state, new, task.table, ids), carry, metrics

    def step(
        state: TrainState,
        carry: Any,
        frozen: Params,
        batch: Batch,
        key: Key,
        here: Callable[[Params], Params],
    ):
        def counts(terms: Terms) -> dict[str, Array]:
            return {name: count for name, (_, (_, count)) in terms.items()}

        def terms_of(params: Params, rows: Batch) -> tuple[Terms, Any]:
            return task.losses(here(params), frozen, carry, rows, key)

        def loss_fn(params: Params, rows: Batch, divisors: dict[str, Array] | None = None):
            terms, after = terms_of(params, rows)
            if divisors is None:
                divisors = at_least_1(total(counts(terms)))
            parts = {name: s / divisors[name] for name, (_, (s, _)) in terms.items()}
            weights = {
                name: weight(state.step) if callable(weight) else weight
                for name, (weight, _) in terms.items()
            }
            return sum(weights[name] * part for name, part in parts.items()), (parts, after)

        gradient = jax.value_and_grad(loss_fn, has_aux=True)

        def gradient_by_pieces(params: Params, pieces: Batch):
            # XLA leaves out of the first pass whatever the counts do not need: all but what is drawn.
            found = jax.lax.map(lambda rows: counts(terms_of(params, rows)[0]), pieces)
            divisors = at_least_1(total(jax.tree.map(lambda x: x.sum(0), found)))

            def add(so_far, rows):
                return jax.tree.map(jnp.add, so_far, gradient(params, rows, divisors)), None

            shapes = jax.eval_shape(
                gradient, params, jax.tree.map(lambda x: x[0], pieces), divisors
            )
            return jax.lax.scan(
                add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), pieces
            )[0]

        pieces = None
        if microbatch and not task.carries:
            pieces = split(
                batch, microbatch(len(batch.example_id), math.prod(batch.item_mask.shape[1:]))
            )
        both = (
            gradient(state.params, batch)
            if pieces is None
            else gradient_by_pieces(state.params, pieces)
        )
        (loss, (metrics, after)), grads = both
        grads, metrics = total((grads, metrics | {"loss": loss}))
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return (
            TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state),
            after,
            metrics,
        )

    return train_step


def at_least_1(counts: dict[str, Array]) -> dict[str, Array]:
    return jax.tree.map(lambda count: jnp.maximum(count, 1.0), counts)


def split(batch: Batch, rows: int) -> Batch | None:
    """[B, ...] -> [B / rows, rows, ...], None where one piece is all. Each piece has rows of every device's part."""
    if not rows or rows == len(batch.example_id):
        return None
    return jax.tree.map(lambda x: x.reshape(rows, -1, *x.shape[1:]).swapaxes(0, 1), batch)
