"""The pure train step. It serves every task, every machine and every mapping over devices."""

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
from rmjax.types import Array, Batch, Counts, Key, Limit, Params, Task, Terms, at

Carry = Any  # pytree with leading axis B; () if the task carries nothing
Metrics = dict[str, Array]  # f32 [] each
Pieces = Callable[[int, int], int]  # (rows, items of a row) -> rows of one piece
TOTALS = ("loss", "grad_norm", "rehearsal_ratio")  # metrics that are no terms of the loss

_Losses = Callable[[Params, Batch], tuple[Terms, Carry]]
_Total = Callable[[Any], Any]  # adds a pytree over the devices


@flax.struct.dataclass
class TrainState:
    """The state that a train step maps to the next one."""

    step: Array  # i32 [], steps taken, which is also the position in the data
    params: Params
    opt_state: optax.OptState
    carry: Carry = ()  # only in checkpoints: the carry of all streams


TrainStep = Callable[[TrainState, Carry, Params, Batch], tuple[TrainState, Carry, Metrics]]


def init_state(task: Task, optimizer: optax.GradientTransformation, key: Key) -> TrainState:
    """Draws the state at step 0.

    Args:
      task: the task to train.
      optimizer: its state is initialised for the parameters.
      key: draws the parameters.

    Returns:
      The state, with an empty carry.
    """
    params = task.init(key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    seed: int,
    axis: str | None = None,
    microbatch: Pieces | None = None,
    sparse_items: bool = False,
) -> TrainStep:
    """Makes the pure train step of a task.

    Every loss term is a (sum, count). Sums and counts are added over devices and then divided once.

    Args:
      task: the task to train.
      optimizer: turns gradients into updates.
      seed: everything drawn is a function of this seed, the step and the example ids.
      axis: name of the mapped data axis if the step runs once per device. None: the step sees the
        complete batch.
      microbatch: rows whose activations are held at once; must divide the rows. Gradients are
        summed over such pieces, so the step stays the same.
      sparse_items: the step reads and writes only those rows of the task's item table that the
        batch touches, see `sparse`.

    Returns:
      train_step(state, carry, frozen, batch) -> (state, carry, metrics). `carry` is the state of
      the streams that outlives a step, () if the task carries nothing. `metrics` has the mean of
      every term, 'loss' and 'grad_norm'. If the task has a limit, 'rehearsal_ratio' is the ratio
      of the two norms before the limit.

    Raises:
      ValueError: `sparse_items` is set and the task has no item table.
    """
    if sparse_items and not task.table:
        raise ValueError(f"sparse_items: {type(task).__name__} has no item table")
    total: _Total = (lambda x: jax.lax.psum(x, axis)) if axis else (lambda x: x)
    update = functools.partial(_update, task, optimizer, microbatch, total)

    def train_step(state: TrainState, carry: Carry, frozen: Params, batch: Batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        losses = lambda params, rows: task.losses(params, frozen, carry, rows, key)
        if not sparse_items:
            return update(state, losses, batch)
        table = task.table
        assert table
        items = len(at(state.params, table))
        ids = sparse.touched(task.item_ids(batch, key, items), items, axis)
        expand = lambda params: sparse.as_table(params, table, ids, items)
        sparse_losses = lambda params, rows: losses(expand(params), rows)
        new, after, metrics = update(sparse.take(state, table, ids), sparse_losses, batch)
        return sparse.put(state, new, table, ids), after, metrics

    return train_step


def _update(
    task: Task,
    optimizer: optax.GradientTransformation,
    microbatch: Pieces | None,
    total: _Total,
    state: TrainState,
    losses: _Losses,
    batch: Batch,
) -> tuple[TrainState, Carry, Metrics]:
    """One step of the optimizer."""
    limit = task.limit
    gradient = _gradient(_weighted_loss(losses, state.step, total, limit), limit)
    pieces = None
    if microbatch and not task.carries:
        items = math.prod(batch.item_mask.shape[1:])
        pieces = split(batch, microbatch(len(batch.example_id), items))
    if pieces is None:
        result = gradient(state.params, batch)
    else:
        result = _gradient_by_pieces(gradient, losses, total, state.params, pieces)
    (loss, (metrics, after)), grads = result
    grads, metrics = total((grads, metrics | {"loss": loss}))
    if limit:
        others, limited = grads
        grads, metrics["rehearsal_ratio"] = _limited(others, limited, limit.ratio)
    metrics["grad_norm"] = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    step, params = state.step + 1, optax.apply_updates(state.params, updates)
    return TrainState(step, params, opt_state), after, metrics


def _weighted_loss(
    losses: _Losses, step: Array, total: _Total, limit: Limit | None
) -> Callable[..., tuple]:
    """Makes loss(params, rows, divisors) -> (loss, (mean of every term, carry)).

    With a limit the loss is a pair: that of the other terms, and that of the limited ones.
    """

    def loss(params: Params, rows: Batch, divisors: Counts | None = None):
        terms, after = losses(params, rows)
        if divisors is None:
            divisors = at_least_1(total(_counts(terms, rows)))
        parts = {name: s / divisors[name] for name, (_, (s, _)) in terms.items()}
        weighted = {
            name: (weight(step, divisors) if callable(weight) else weight) * parts[name]
            for name, (weight, _) in terms.items()
        }
        if limit is None:
            return sum(weighted.values()), (parts, after)
        limited = [x for name, x in weighted.items() if name in limit.terms]
        others = [x for name, x in weighted.items() if name not in limit.terms]
        return (sum(others, jnp.zeros(())), sum(limited, jnp.zeros(()))), (parts, after)

    return loss


def _gradient(loss: Callable[..., tuple], limit: Limit | None) -> Callable[..., Any]:
    """Makes the function of `loss` that returns ((loss, auxiliary values), gradient).

    With a limit the gradient is a pair, as the loss is: one forward pass and two backward passes.
    """
    if limit is None:
        return jax.value_and_grad(loss, has_aux=True)

    def gradient(params: Params, *args: Any) -> Any:
        forward: tuple[Any, ...] = jax.vjp(lambda p: loss(p, *args), params, has_aux=True)
        both, pull, aux = forward
        one, none = jnp.ones(()), jnp.zeros(())
        grads = pull((one, none))[0], pull((none, one))[0]
        return (sum(both), aux), grads

    return gradient


def _limited(others: Params, limited: Params, ratio: float) -> tuple[Params, Array]:
    """Adds two gradients; the second is scaled down to the ratio, where both are at work.

    Args:
      others: gradient of the terms without a limit.
      limited: gradient of the limited terms.
      ratio: largest norm of the limited gradient, relative to that of the other.

    Returns:
      The sum, and the ratio of the norms before the scaling. Norms are over the arrays that both
      gradients reach. Other arrays, such as those of the rehearsal's decoder, are not scaled.
    """
    shared = jax.tree.map(lambda a, b: jnp.any(a != 0) & jnp.any(b != 0), others, limited)
    norm = lambda grads: optax.tree.norm(
        jax.tree.map(lambda x, both: jnp.where(both, x, 0.0), grads, shared)
    )
    # Without shared arrays both norms are 0, and nothing is scaled. The ratio stays finite, since a
    # run stops at a metric that is not.
    tiny, most = jnp.finfo(jnp.float32).tiny, jnp.finfo(jnp.float32).max
    before = jnp.minimum(norm(limited) / jnp.maximum(norm(others), tiny), most)
    scale = jnp.minimum(1.0, ratio / jnp.maximum(before, tiny))
    add = lambda a, b, both: a + jnp.where(both, scale, 1.0) * b
    return jax.tree.map(add, others, limited, shared), before


def _gradient_by_pieces(
    gradient: Callable[..., Any], losses: _Losses, total: _Total, params: Params, pieces: Batch
) -> Any:
    """Adds up the gradient over pieces of a batch, which have a leading axis."""
    # The counts need only what is drawn. XLA removes all other work from this first pass.
    counts = jax.lax.map(lambda rows: _counts(losses(params, rows)[0], rows), pieces)
    divisors = at_least_1(total(jax.tree.map(lambda x: x.sum(0), counts)))

    def add(so_far, rows):
        return jax.tree.map(jnp.add, so_far, gradient(params, rows, divisors)), None

    first = jax.tree.map(lambda x: x[0], pieces)
    shapes = jax.eval_shape(gradient, params, first, divisors)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, pieces)[0]


def _counts(terms: Terms, rows: Batch) -> dict[str, Array]:
    """The count of every term, and the number of streams."""
    streams = jnp.asarray(len(rows.example_id), jnp.float32)
    return {"streams": streams} | {name: count for name, (_, (_, count)) in terms.items()}


def at_least_1(counts: dict[str, Array]) -> dict[str, Array]:
    """Raises counts of 0 to 1, so that a term without entries is 0 and not NaN.

    Args:
      counts: f32 [] for every term.

    Returns:
      The same, at least 1.
    """
    return jax.tree.map(lambda count: jnp.maximum(count, 1.0), counts)


def split(batch: Batch, rows: int) -> Batch | None:
    """Splits a batch into pieces. Every piece has rows of every device's part.

    Args:
      batch: leaves [B, ...].
      rows: rows of a piece; must divide B.

    Returns:
      Leaves [B / rows, rows, ...]; None if one piece is the complete batch.
    """
    if not rows or rows == len(batch.example_id):
        return None
    return jax.tree.map(lambda x: x.reshape(rows, -1, *x.shape[1:]).swapaxes(0, 1), batch)
