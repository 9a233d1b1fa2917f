"""The pure train and evaluation steps: every task, every machine, any mapping over devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from rmjax.types import Array, Batch, Key, Params, Task


@flax.struct.dataclass
class TrainState:
    step: Array  # i32 [] steps taken = position in the data
    params: Params
    opt_state: Any


def init_state(task: Task, optimizer: optax.GradientTransformation, key: Key) -> TrainState:
    params = task.init(key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make_train_step(
    task: Task, optimizer: optax.GradientTransformation, seed: int, axis: str | None = None
) -> Callable:
    """-> train_step(state, carry, frozen, batch) -> state, carry, metrics.

    `axis` names the mapped data axis when the step runs once per device (pmap); None when it sees the whole batch.
    Every term is a (sum, count), each added over devices and then divided once. metrics: {term: mean} and 'loss'.
    `carry` is per-stream state that outlives a step; recommendation has none and passes () through.
    """
    total = (lambda x: jax.lax.psum(x, axis)) if axis else (lambda x: x)

    def train_step(state: TrainState, carry: Any, frozen: Params, batch: Batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_fn(params: Params):
            terms = task.losses(params, frozen, batch, key)
            parts = {name: (s, jnp.maximum(total(count), 1.0)) for name, (_, (s, count)) in terms.items()}
            loss = sum(weight * parts[name][0] / parts[name][1] for name, (weight, _) in terms.items())
            return loss, {name: s / count for name, (s, count) in parts.items()}

        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        grads, metrics = total((grads, metrics | {"loss": loss}))
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), carry, metrics

    return train_step


def make_eval_step(task: Task) -> Callable[[Params, Batch], Array]:
    """-> eval_step(params, batch) -> scores [B, Q]."""
    return task.scores
