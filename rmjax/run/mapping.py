"""Devices: the pure steps of train_step.py mapped over them, by `jax.pmap` or by `jax.jit` over a mesh.

Both give the same numbers: nothing drawn depends on the number of devices, and sums are added before they are divided.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rmjax.io.cost import tree_bytes
from rmjax.run.step import Pieces, make_train_step
from rmjax.types import Batch, Params, Task

# What a mesh splits over its axis 'model': a pattern of a parameter's path, and the mesh axis of each axis of its own.
# Moments of an optimizer lie as their parameter does; all else, and what does not divide, is on every device.
SPLIT_TABLES = ((r"(^|/)embed$", ("model",)),)  # item tables, by rows
SPLIT_LAYERS = (  # kernels are [outputs, inputs]: by heads, by the hidden units of a feed-forward layer
    (r"/(query|key|value|wide|intermediate|c_fc|c_attn)/(kernel|bias)$", ("model",)),
    (
        r"/(slots|self|attention|layer_\d+|mlp|h_\d+)/(out|output|c_proj|attn_c_proj|narrow)/kernel$",
        (None, "model"),
    ),
)


class Mapped(NamedTuple):
    """A task's steps over devices. States and parameters stay on the devices between calls."""

    devices: int  # over which a batch is split; every batch size must be a multiple
    put: Callable[[Any], Any]  # host tree -> replicated (or sharded) on the devices
    get: Callable[[Any], Any]  # the way back, to host arrays
    train_step: Callable  # (state, carry, frozen, host batch) -> state, carry, metrics on the devices; takes the state over
    # (params on the devices, host batch) -> [B, Q] or [B, Q, C] of this process
    scores: Callable[[Params, Batch], np.ndarray]
    # of a task that rehearses: (params on the devices, host batch, host batch of others) -> {name: [B, n]} of this
    # process
    rehearsals: Callable[[Params, Batch, Batch], dict[str, np.ndarray]]
    put_carry: Callable[
        [Any], Any
    ]  # host tree with leading axis B -> split over the devices as a batch is
    get_carry: Callable[[Any], Any]  # the way back
    # of a task that carries: (params and carry on the devices, host batch) -> {name: [B, T]} of this process, carry
    measure: Callable[[Params, Any, Batch], tuple[dict[str, np.ndarray], Any]]
    # (state, carry, frozen, host batch), of which only shapes matter -> the compiled train step, for its costs
    compiled: Callable
    bytes: Callable[
        [Any], int
    ]  # tree, of which only shapes matter -> what a device holds of it after `put`


def make_mapped(
    task: Task,
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    mapping: str = "pmap",
    devices: int = 0,
    model_devices: int = 1,
    microbatch: Pieces | None = None,
    sparse_items: bool = False,
    split_layers: bool = False,
) -> Mapped:
    """Maps a task's steps over `devices` of them, 0 for all that there are.

    mapping: 'pmap' over the data axis, or 'mesh': jit over ('data', 'model') with item tables split over
    `model_devices`, and with `split_layers` also Transformer layers. microbatch (of one device) and sparse_items: see
    `make_train_step`.
    """
    found = jax.devices()
    if devices > len(found):
        raise ValueError(
            f"config.train.devices = {devices}, but there are {len(found)}: {found}. Lower it, or take 0 for all"
        )
    use = found[: devices or len(found)]
    mine = sum(device.process_index == jax.process_index() for device in use)
    if mine * jax.process_count() != len(use):
        here = f"{mine} of them on process {jax.process_index()} of {jax.process_count()}"
        raise ValueError(
            f"config.train.devices = {devices}: {here}; every process must have as many"
        )
    if mapping == "pmap":
        return _one_by_one(_pmap(task, optimizer, seed, use, microbatch, sparse_items))
    split = f"config.train.model_devices = {model_devices}"
    if len(use) % model_devices:
        raise ValueError(
            f"{split} does not divide the {len(use)} devices: change it, or config.train.devices"
        )
    if (
        mine % model_devices
    ):  # streams are read by processes, and devices that share a table share its streams
        raise ValueError(
            f"{split} does not divide the {mine} of a process: change it, or config.train.devices"
        )
    mesh = Mesh(np.array(use).reshape(-1, model_devices), ("data", "model"))
    rules = SPLIT_TABLES + (SPLIT_LAYERS if split_layers else ())
    return _one_by_one(_mesh(task, optimizer, seed, mesh, microbatch, sparse_items, rules))


def _one_by_one(mapped: Mapped) -> Mapped:
    """On CPUs of several processes a step waits for the one before: of many under way, each waits for the threads that
    another holds while it waits for gloo, for ever.
    """
    if jax.process_count() == 1 or jax.devices()[0].platform != "cpu":
        return mapped
    return mapped._replace(
        train_step=lambda *given: jax.block_until_ready(mapped.train_step(*given))
    )


def _pmap(
    task: Task,
    optimizer: optax.GradientTransformation,
    seed: int,
    devices: list,
    microbatch: Pieces | None,
    sparse_items: bool,
) -> Mapped:
    local = [d for d in devices if d.process_index == jax.process_index()]
    spread = NamedSharding(Mesh(np.array(local), ("data",)), PartitionSpec("data"))
    step = make_train_step(task, optimizer, seed, "data", microbatch, sparse_items)
    step = jax.pmap(step, "data", devices=devices, donate_argnums=(0, 1))
    read = jax.pmap(task.measure, devices=local, donate_argnums=1)
    evaluate, rehearse = (jax.pmap(f, devices=local) for f in (task.scores, task.rehearsals))

    def split(batch: Any) -> Any:
        cut = jax.tree.map(
            lambda x: x.reshape(len(local), len(x) // len(local), *x.shape[1:]), batch
        )
        return jax.device_put(cut, spread)

    def put(tree: Any) -> Any:
        every = lambda x: np.broadcast_to(np.asarray(x), (len(local), *np.shape(x)))
        return jax.device_put(jax.tree.map(every, tree), spread)

    def get(tree: Any) -> Any:
        return jax.device_get(jax.tree.map(lambda x: x.addressable_data(0)[0], tree))

    def whole(x: Any) -> np.ndarray:
        x = np.asarray(x)
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    def measure(params: Params, carry: Any, batch: Batch) -> tuple[dict[str, np.ndarray], Any]:
        found, carry = read(params, carry, split(batch))
        return jax.tree.map(whole, found), carry

    def compiled(state: Any, carry: Any, frozen: Any, batch: Batch) -> Any:
        shape = lambda x, *leading: jax.ShapeDtypeStruct(
            (len(local), *leading, *x.shape[len(leading) :]), x.dtype
        )
        everywhere = lambda tree: jax.tree.map(shape, tree)
        cut = lambda tree: jax.tree.map(lambda x: shape(x, len(x) // len(local)), tree)
        return step.lower(everywhere(state), cut(carry), everywhere(frozen), cut(batch)).compile()

    return Mapped(
        devices=len(devices),
        put=put,
        get=get,
        train_step=lambda state, carry, frozen, batch: step(state, carry, frozen, split(batch)),
        scores=lambda params, batch: whole(evaluate(params, split(batch))),
        rehearsals=lambda params, *pair: jax.tree.map(whole, rehearse(params, *map(split, pair))),
        put_carry=split,
        get_carry=lambda carry: jax.tree.map(whole, carry),
        measure=measure,
        compiled=compiled,
        bytes=tree_bytes,
    )


def _mesh(
    task: Task,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    microbatch: Pieces | None,
    sparse_items: bool,
    rules: tuple,
) -> Mapped:
    by_example, processes = NamedSharding(mesh, PartitionSpec("data")), jax.process_count()

    def placed(path: tuple, x: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = next((axes for pattern, axes in rules if re.search(pattern, name)), ())
        fits = all(
            size % mesh.shape[axis] == 0
            for size, axis in zip(np.shape(x), axes, strict=False)
            if axis
        )
        if not fits:
            told = "%s %s does not divide among the devices of the model: it is whole on every one"
            logging.log_first_n(logging.WARNING, told, 3, name, np.shape(x))
        return NamedSharding(mesh, PartitionSpec(*axes) if fits else PartitionSpec())

    def shardings(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(placed, tree)

    def put(tree: Any) -> Any:
        """Every process has the whole tree, and takes the parts of its devices."""
        part = lambda x, how: jax.make_array_from_callback(
            np.shape(x), how, lambda index: np.asarray(x)[index]
        )
        return jax.tree.map(part if processes > 1 else jax.device_put, tree, shardings(tree))

    def whole(x: jax.Array) -> np.ndarray:
        """The devices of a process have all parts of it."""
        if x.is_fully_addressable:
            return jax.device_get(x)
        found = np.empty(x.shape, x.dtype)
        for shard in x.addressable_shards:
            found[shard.index] = shard.data
        return found

    def split(batch: Any) -> Any:
        local = lambda x: jax.make_array_from_process_local_data(by_example, np.asarray(x))
        return jax.tree.map(local, batch)

    spread = mesh.shape["data"] > 1
    inner = make_train_step(
        task, optimizer, seed, "data" if spread else None, microbatch, sparse_items
    )
    everywhere, by_rows = PartitionSpec(), PartitionSpec("data")
    # By hand over 'data', as pmap does it: one all-reduce for the gradients. What lies over 'model' is the compiler's.
    if spread:
        inner = jax.shard_map(
            inner,
            mesh=mesh,
            axis_names={"data"},
            in_specs=(everywhere, by_rows, everywhere, by_rows),
            out_specs=(everywhere, by_rows, everywhere),
            check_vma=False,
        )

    def pinned(state, carry, frozen, batch):
        """The new state lies where the old one lay, whatever the partitioner would like."""
        new, carry, metrics = inner(state, carry, frozen, batch)
        return jax.lax.with_sharding_constraint(new, shardings(new)), carry, metrics

    step = jax.jit(pinned, donate_argnums=(0, 1))
    read = jax.jit(task.measure, out_shardings=by_example, donate_argnums=1)
    evaluate, rehearse = (
        jax.jit(f, out_shardings=by_example) for f in (task.scores, task.rehearsals)
    )

    def whole_rows(x: jax.Array) -> np.ndarray:
        first = {
            s.index[0].start or 0: np.asarray(s.data) for s in x.addressable_shards
        }  # copies are left out
        return np.concatenate([first[i] for i in sorted(first)])

    def measure(params: Params, carry: Any, batch: Batch) -> tuple[dict[str, np.ndarray], Any]:
        found, carry = read(params, carry, split(batch))
        return jax.tree.map(whole_rows, found), carry

    def shapes(tree: Any) -> Any:
        laid = lambda x, how: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=how)
        return jax.tree.map(laid, tree, shardings(tree))

    def compiled(state: Any, carry: Any, frozen: Any, batch: Batch) -> Any:
        laid = lambda x: jax.ShapeDtypeStruct(
            (len(x) * processes, *x.shape[1:]), x.dtype, sharding=by_example
        )
        return step.lower(
            shapes(state), jax.tree.map(laid, carry), shapes(frozen), jax.tree.map(laid, batch)
        ).compile()

    return Mapped(
        devices=mesh.shape["data"],
        put=put,
        get=lambda tree: jax.tree.map(whole, tree),
        train_step=lambda state, carry, frozen, batch: step(state, carry, frozen, split(batch)),
        scores=lambda params, batch: whole_rows(evaluate(params, split(batch))),
        rehearsals=lambda params, *pair: jax.tree.map(
            whole_rows, rehearse(params, *map(split, pair))
        ),
        put_carry=split,
        get_carry=lambda carry: jax.tree.map(whole_rows, carry),
        measure=measure,
        compiled=compiled,
        bytes=lambda tree: sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(shapes(tree))
        ),
    )
