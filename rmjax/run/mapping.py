"""The steps of a task over devices, by `jax.pmap` or by `jax.jit` over a mesh.

Both mappings give the same numbers. Nothing drawn depends on the number of devices, and sums are
added over devices before they are divided.
"""

from __future__ import annotations

import dataclasses
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
from rmjax.run.step import Carry, Pieces, TrainState, TrainStep, make_train_step
from rmjax.types import Batch, Params, Task

Tree = Any  # pytree of arrays
Sums = dict[str, np.ndarray]
Rule = tuple[str, tuple[str | None, ...]]

# What a mesh splits over its axis 'model': (regex on the parameter's path, mesh axis for each array
# axis). The moments of an optimizer lie as their parameter does. All other arrays, and those whose
# size does not divide, are on every device.
SPLIT_TABLES: tuple[Rule, ...] = ((r"(^|/)embed$", ("model",)),)  # item tables, by rows
# Kernels are [outputs, inputs]. They are split by heads, or by the hidden units of a feed-forward
# layer.
SPLIT_LAYERS: tuple[Rule, ...] = (
    (r"/(query|key|value|wide|intermediate|c_fc|c_attn)/(kernel|bias)$", ("model",)),
    (
        r"/(slots|self|attention|layer_\d+|mlp|h_\d+)/(out|output|c_proj|attn_c_proj|narrow)/kernel$",
        (None, "model"),
    ),
)


class Mapped(NamedTuple):
    """The steps of a task over devices. States and parameters stay on the devices between calls.

    Attributes:
      devices: over which a batch is split; every batch size must be a multiple.
      put: host tree -> replicated (or sharded) on the devices.
      get: the inverse of `put`, to host arrays.
      train_step: (state, carry, frozen, host batch) -> (state, carry, metrics), on the devices. It
        donates the state and the carry, so the caller must not use the old ones again.
      scores: (params on the devices, host batch) -> [B, Q] or [B, Q, C] of this process.
      rehearsals: for a task that rehearses: (params on the devices, host batch, host batch of other
        streams) -> {name: [B, n]} of this process.
      put_carry: host tree with leading axis B -> split over the devices as a batch is.
      get_carry: the inverse of `put_carry`.
      measure: for a task that carries: (params and carry on the devices, host batch) -> ({name:
        [B, T]} of this process, carry).
      compiled: (state, carry, frozen, host batch) -> the compiled train step, a
        `jax.stages.Compiled`, to read costs from. Only the shapes of the arguments matter.
      bytes: tree -> bytes that one device holds of it after `put`. Only shapes matter.
    """

    devices: int
    put: Callable[[Tree], Tree]
    get: Callable[[Tree], Tree]
    train_step: TrainStep
    scores: Callable[[Params, Batch], np.ndarray]
    rehearsals: Callable[[Params, Batch, Batch], Sums]
    put_carry: Callable[[Carry], Carry]
    get_carry: Callable[[Carry], Carry]
    measure: Callable[[Params, Carry, Batch], tuple[Sums, Carry]]
    compiled: Callable[[TrainState, Carry, Params, Batch], Any]
    bytes: Callable[[Tree], int]


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
    """Maps the steps of a task over devices.

    Args:
      task: the task to train.
      optimizer: see `make_train_step`.
      seed: see `make_train_step`.
      mapping: 'pmap' over the data axis, or 'mesh': jit over the axes ('data', 'model').
      devices: how many devices; 0: all that JAX sees.
      model_devices: for 'mesh': devices over which item tables are split.
      microbatch: rows of one device, see `make_train_step`.
      sparse_items: see `make_train_step`.
      split_layers: for 'mesh': Transformer layers are split over `model_devices` too.

    Returns:
      The mapped steps.

    Raises:
      ValueError: there are fewer devices; or processes have different numbers of them; or
        `model_devices` does not divide all devices, or those of a process.
    """
    known = jax.devices()
    if devices > len(known):
        raise ValueError(
            f"config.train.devices = {devices}, but there are {len(known)}: {known}. Lower it, or "
            "set 0 to use all"
        )
    use = known[: devices or len(known)]
    mine = sum(device.process_index == jax.process_index() for device in use)
    if mine * jax.process_count() != len(use):
        place = f"process {jax.process_index()} of {jax.process_count()} has {mine} of them"
        raise ValueError(
            f"config.train.devices = {devices}: {place}; every process must have as many"
        )
    if mapping == "pmap":
        return _one_by_one(_pmap(task, optimizer, seed, use, microbatch, sparse_items))
    split = f"config.train.model_devices = {model_devices}"
    if len(use) % model_devices:
        raise ValueError(
            f"{split} does not divide the {len(use)} devices: change it, or config.train.devices"
        )
    # Processes read streams, and devices that share a table share its streams.
    if mine % model_devices:
        raise ValueError(
            f"{split} does not divide the {mine} of a process: change it, or config.train.devices"
        )
    mesh = Mesh(np.array(use).reshape(-1, model_devices), ("data", "model"))
    rules = SPLIT_TABLES + (SPLIT_LAYERS if split_layers else ())
    return _one_by_one(_mesh(task, optimizer, seed, _Layout(mesh, rules), microbatch, sparse_items))


def _one_by_one(mapped: Mapped) -> Mapped:
    """On the CPUs of several processes, makes a step wait for the one before, else they deadlock.

    With several steps under way, one step waits for threads that another step holds, and that step
    waits for gloo, for ever.
    """
    if jax.process_count() == 1 or jax.devices()[0].platform != "cpu":
        return mapped
    wait = lambda *args: jax.block_until_ready(mapped.train_step(*args))
    return mapped._replace(train_step=wait)


def _pmap(
    task: Task,
    optimizer: optax.GradientTransformation,
    seed: int,
    devices: list[jax.Device],
    microbatch: Pieces | None,
    sparse_items: bool,
) -> Mapped:
    """Maps the steps with `jax.pmap` over the data axis."""
    local = [d for d in devices if d.process_index == jax.process_index()]
    spread = NamedSharding(Mesh(np.array(local), ("data",)), PartitionSpec("data"))
    one_device = make_train_step(task, optimizer, seed, "data", microbatch, sparse_items)
    step = jax.pmap(one_device, "data", devices=devices, donate_argnums=(0, 1))
    read = jax.pmap(task.measure, devices=local, donate_argnums=1)
    evaluate, rehearse = (jax.pmap(f, devices=local) for f in (task.scores, task.rehearsals))

    def split(batch: Tree) -> Tree:
        cut = lambda x: x.reshape(len(local), len(x) // len(local), *x.shape[1:])
        return jax.device_put(jax.tree.map(cut, batch), spread)

    def put(tree: Tree) -> Tree:
        every = lambda x: np.broadcast_to(np.asarray(x), (len(local), *np.shape(x)))
        return jax.device_put(jax.tree.map(every, tree), spread)

    def get(tree: Tree) -> Tree:
        return jax.device_get(jax.tree.map(lambda x: x.addressable_data(0)[0], tree))

    def join(x: jax.Array) -> np.ndarray:
        host = np.asarray(x)
        return host.reshape(host.shape[0] * host.shape[1], *host.shape[2:])

    def measure(params: Params, carry: Carry, batch: Batch) -> tuple[Sums, Carry]:
        sums, carry = read(params, carry, split(batch))
        return jax.tree.map(join, sums), carry

    def compiled(
        state: TrainState, carry: Carry, frozen: Params, batch: Batch
    ) -> jax.stages.Compiled:
        # With the shardings of `put` and `split` this is the program that `train_step` runs.
        shape = lambda x, *leading: jax.ShapeDtypeStruct(
            (len(local), *leading, *x.shape[len(leading) :]), x.dtype, sharding=spread
        )
        everywhere = lambda tree: jax.tree.map(shape, tree)
        cut = lambda tree: jax.tree.map(lambda x: shape(x, len(x) // len(local)), tree)
        return step.lower(everywhere(state), cut(carry), everywhere(frozen), cut(batch)).compile()

    return Mapped(
        devices=len(devices),
        put=put,
        get=get,
        train_step=lambda state, carry, frozen, batch: step(state, carry, frozen, split(batch)),
        scores=lambda params, batch: join(evaluate(params, split(batch))),
        rehearsals=lambda params, *pair: jax.tree.map(join, rehearse(params, *map(split, pair))),
        put_carry=split,
        get_carry=lambda carry: jax.tree.map(join, carry),
        measure=measure,
        compiled=compiled,
        bytes=tree_bytes,
    )


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where arrays lie on a mesh with the axes ('data', 'model')."""

    mesh: Mesh
    rules: tuple[Rule, ...]

    @property
    def by_rows(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec("data"))

    def shardings(self, tree: Tree) -> Tree:
        return jax.tree_util.tree_map_with_path(self._place, tree)

    def _place(self, path: tuple, x: jax.Array) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = next((axes for pattern, axes in self.rules if re.search(pattern, name)), ())
        pairs = zip(np.shape(x), axes, strict=False)
        fits = all(size % self.mesh.shape[axis] == 0 for size, axis in pairs if axis)
        if not fits:
            text = "%s %s does not divide among the model devices: every one holds all of it"
            logging.log_first_n(logging.WARNING, text, 3, name, np.shape(x))
        return NamedSharding(self.mesh, PartitionSpec(*axes) if fits else PartitionSpec())

    def put(self, tree: Tree) -> Tree:
        """Every process has the complete tree, and takes the parts of its devices."""
        part = lambda x, how: jax.make_array_from_callback(
            np.shape(x), how, lambda index: np.asarray(x)[index]
        )
        place = part if jax.process_count() > 1 else jax.device_put
        return jax.tree.map(place, tree, self.shardings(tree))

    def get(self, tree: Tree) -> Tree:
        return jax.tree.map(self._collect, tree)

    @staticmethod
    def _collect(x: jax.Array) -> np.ndarray:
        """The devices of a process have all parts of it."""
        if x.is_fully_addressable:
            return jax.device_get(x)
        host = np.empty(x.shape, x.dtype)
        for shard in x.addressable_shards:
            host[shard.index] = shard.data
        return host

    def split(self, batch: Tree) -> Tree:
        local = lambda x: jax.make_array_from_process_local_data(self.by_rows, np.asarray(x))
        return jax.tree.map(local, batch)

    @staticmethod
    def join(x: jax.Array) -> np.ndarray:
        """The rows of this process. Copies on other devices are left out."""
        first = {s.index[0].start or 0: np.asarray(s.data) for s in x.addressable_shards}
        return np.concatenate([first[i] for i in sorted(first)])

    def shapes(self, tree: Tree) -> Tree:
        """Shapes and dtypes with the place of every array."""
        laid = lambda x, how: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=how)
        return jax.tree.map(laid, tree, self.shardings(tree))

    def row_shapes(self, tree: Tree) -> Tree:
        """As `shapes`, for what is split as a batch is; `tree` has the rows of one process."""
        processes = jax.process_count()
        laid = lambda x: jax.ShapeDtypeStruct(
            (len(x) * processes, *x.shape[1:]), x.dtype, sharding=self.by_rows
        )
        return jax.tree.map(laid, tree)

    def bytes(self, tree: Tree) -> int:
        leaves = jax.tree.leaves(self.shapes(tree))
        size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        return sum(map(size, leaves))


def _mesh(
    task: Task,
    optimizer: optax.GradientTransformation,
    seed: int,
    layout: _Layout,
    microbatch: Pieces | None,
    sparse_items: bool,
) -> Mapped:
    """Maps the steps with `jax.jit` over a mesh."""
    step = _mesh_step(task, optimizer, seed, layout, microbatch, sparse_items)
    read = jax.jit(task.measure, out_shardings=layout.by_rows, donate_argnums=1)
    evaluate = jax.jit(task.scores, out_shardings=layout.by_rows)
    rehearse = jax.jit(task.rehearsals, out_shardings=layout.by_rows)
    split, join = layout.split, layout.join

    def measure(params: Params, carry: Carry, batch: Batch) -> tuple[Sums, Carry]:
        sums, carry = read(params, carry, split(batch))
        return jax.tree.map(join, sums), carry

    def compiled(
        state: TrainState, carry: Carry, frozen: Params, batch: Batch
    ) -> jax.stages.Compiled:
        shapes, rows = layout.shapes, layout.row_shapes
        return step.lower(shapes(state), rows(carry), shapes(frozen), rows(batch)).compile()

    return Mapped(
        devices=layout.mesh.shape["data"],
        put=layout.put,
        get=layout.get,
        train_step=lambda state, carry, frozen, batch: step(state, carry, frozen, split(batch)),
        scores=lambda params, batch: join(evaluate(params, split(batch))),
        rehearsals=lambda params, *pair: jax.tree.map(join, rehearse(params, *map(split, pair))),
        put_carry=split,
        get_carry=lambda carry: jax.tree.map(join, carry),
        measure=measure,
        compiled=compiled,
        bytes=layout.bytes,
    )


def _mesh_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    seed: int,
    layout: _Layout,
    microbatch: Pieces | None,
    sparse_items: bool,
) -> jax.stages.Wrapped:
    """The jitted train step over a mesh."""
    spread = layout.mesh.shape["data"] > 1
    axis = "data" if spread else None
    inner = make_train_step(task, optimizer, seed, axis, microbatch, sparse_items)
    everywhere, by_rows = PartitionSpec(), PartitionSpec("data")
    # Over 'data' the split is explicit, as pmap does it, which gives one all-reduce for the
    # gradients. The compiler decides over 'model'.
    if spread:
        inner = jax.shard_map(
            inner,
            mesh=layout.mesh,
            axis_names={"data"},
            in_specs=(everywhere, by_rows, everywhere, by_rows),
            out_specs=(everywhere, by_rows, everywhere),
            check_vma=False,
        )

    def pinned(state, carry, frozen, batch):
        """Keeps the new state where the old one lay, against the partitioner's own choice."""
        new, carry, metrics = inner(state, carry, frozen, batch)
        return jax.lax.with_sharding_constraint(new, layout.shardings(new)), carry, metrics

    return jax.jit(pinned, donate_argnums=(0, 1))
