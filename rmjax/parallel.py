"""Devices: the pure steps of train_step.py mapped over them, by `jax.pmap` or by `jax.jit` over a mesh.

Both give the same numbers: nothing drawn depends on the number of devices, and sums are added before they are divided.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rmjax.train_step import Pieces, make_eval_step, make_train_step
from rmjax.types import Batch, Params, StreamTask, Task


class Mapped(NamedTuple):
    """A task's steps over devices. States and parameters stay on the devices between calls."""

    devices: int  # over which a batch is split; every batch size must be a multiple
    put: Callable[[Any], Any]  # host tree -> replicated (or sharded) on the devices
    get: Callable[[Any], Any]  # the way back, to host arrays
    train_step: (
        Callable  # (state, carry, frozen, host batch) -> state, carry, metrics on the devices; takes the state over
    )
    # (params on the devices, host batch) -> [B, Q] or [B, Q, C] of this process
    scores: Callable[[Params, Batch], np.ndarray]
    put_carry: Callable[[Any], Any]  # host tree with leading axis B -> split over the devices as a batch is
    get_carry: Callable[[Any], Any]  # the way back
    # of a `StreamTask`: (params and carry on the devices, host batch) -> {name: [B, T]} of this process, carry
    measure: Callable[[Params, Any, Batch], tuple[dict[str, np.ndarray], Any]]
    compiled: Callable  # (state, carry, frozen, host batch) -> the compiled train step, for its costs


def make_mapped(
    task: Task | StreamTask,
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    mapping: str = "pmap",
    devices: int = 0,
    model_devices: int = 1,
    microbatch: Pieces | None = None,
) -> Mapped:
    """mapping: 'pmap' over the data axis, or 'mesh': jit over ('data', 'model') with item tables split by rows over
    `model_devices`. devices: how many to use, 0 for all of them. microbatch: see `make_train_step`, for one device."""
    found = jax.devices()
    if devices > len(found):
        raise ValueError(f"config.train.devices = {devices}, but there are {len(found)}: {found}")
    use = found[: devices or len(found)]
    if mapping == "pmap":
        return _pmap(task, optimizer, seed, use, microbatch)
    if len(use) % model_devices:
        raise ValueError(f"config.train.model_devices = {model_devices} does not divide the {len(use)} devices")
    mesh = Mesh(np.array(use).reshape(-1, model_devices), ("data", "model"))
    return _mesh(task, optimizer, seed, mesh, microbatch)


def _pmap(
    task: Task | StreamTask,
    optimizer: optax.GradientTransformation,
    seed: int,
    devices: list,
    microbatch: Pieces | None,
) -> Mapped:
    local = [d for d in devices if d.process_index == jax.process_index()]
    spread = NamedSharding(Mesh(np.array(local), ("data",)), PartitionSpec("data"))
    step = make_train_step(task, optimizer, seed, "data", microbatch)
    step = jax.pmap(step, "data", devices=devices, donate_argnums=(0, 1))
    if isinstance(task, StreamTask):
        read = jax.pmap(task.measure, devices=local, donate_argnums=1)
    else:
        evaluate = jax.pmap(make_eval_step(task), devices=local)

    def split(batch: Any) -> Any:
        cut = jax.tree.map(lambda x: x.reshape(len(local), len(x) // len(local), *x.shape[1:]), batch)
        return jax.device_put(cut, spread)

    def put(tree: Any) -> Any:
        every = lambda x: np.broadcast_to(np.asarray(x), (len(local), *np.shape(x)))  # noqa: E731
        return jax.device_put(jax.tree.map(every, tree), spread)

    def get(tree: Any) -> Any:
        return jax.device_get(jax.tree.map(lambda x: x.addressable_data(0)[0], tree))

    def whole(x: Any) -> np.ndarray:
        x = np.asarray(x)
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    def measure(params: Params, carry: Any, batch: Batch) -> tuple[dict[str, np.ndarray], Any]:
        found, carry = read(params, carry, split(batch))
        return jax.tree.map(whole, found), carry

    return Mapped(
        devices=len(devices),
        put=put,
        get=get,
        train_step=lambda state, carry, frozen, batch: step(state, carry, frozen, split(batch)),
        scores=lambda params, batch: whole(evaluate(params, split(batch))),
        put_carry=split,
        get_carry=lambda carry: jax.tree.map(whole, carry),
        measure=measure,
        compiled=lambda state, carry, frozen, batch: step.lower(state, carry, frozen, split(batch)).compile(),
    )


def _mesh(
    task: Task | StreamTask, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh, microbatch: Pieces | None
) -> Mapped:
    whole, by_row = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("model"))
    by_example = NamedSharding(mesh, PartitionSpec("data"))

    def placed(path: tuple, x: Any) -> NamedSharding:
        """Item tables (and their Adam moments) are split by rows, everything else is on every device."""
        table = any(getattr(k, "key", None) == "embed" for k in path)
        return by_row if table and np.shape(x)[0] % mesh.shape["model"] == 0 else whole

    def shardings(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(placed, tree)

    def put(tree: Any) -> Any:
        return jax.tree.map(jax.device_put, tree, shardings(tree))

    def split(batch: Any) -> Any:
        local = lambda x: jax.make_array_from_process_local_data(by_example, np.asarray(x))  # noqa: E731
        return jax.tree.map(local, batch)

    data = mesh.shape["data"]
    pieces: Pieces | None = None
    if microbatch:
        pieces = lambda rows, items: microbatch(rows // data, items) * data  # noqa: E731
    inner = make_train_step(task, optimizer, seed, microbatch=pieces)

    def pinned(state, carry, frozen, batch):
        """The new state lies where the old one lay, whatever the partitioner would like."""
        new, carry, metrics = inner(state, carry, frozen, batch)
        carry = jax.lax.with_sharding_constraint(carry, jax.tree.map(lambda x: by_example, carry))
        return jax.lax.with_sharding_constraint(new, shardings(new)), carry, metrics

    step = jax.jit(pinned, donate_argnums=(0, 1))
    if isinstance(task, StreamTask):
        read = jax.jit(task.measure, out_shardings=by_example, donate_argnums=1)
    else:
        evaluate = jax.jit(make_eval_step(task), out_shardings=by_example)

    def whole_rows(x: jax.Array) -> np.ndarray:
        first = {s.index[0].start or 0: np.asarray(s.data) for s in x.addressable_shards}  # copies are left out
        return np.concatenate([first[i] for i in sorted(first)])

    def measure(params: Params, carry: Any, batch: Batch) -> tuple[dict[str, np.ndarray], Any]:
        found, carry = read(params, carry, split(batch))
        return jax.tree.map(whole_rows, found), carry

    return Mapped(
        devices=mesh.shape["data"],
        put=put,
        get=jax.device_get,
        train_step=lambda state, carry, frozen, batch: step(state, carry, frozen, split(batch)),
        scores=lambda params, batch: whole_rows(evaluate(params, split(batch))),
        put_carry=split,
        get_carry=lambda carry: jax.tree.map(whole_rows, carry),
        measure=measure,
        compiled=lambda state, carry, frozen, batch: step.lower(state, carry, frozen, split(batch)).compile(),
    )
