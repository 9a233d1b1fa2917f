"""What a memory costs: the size of its state, its parameters, and its work for each item."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rmjax.io import cost
from rmjax.machines.scan import Memorized, memorize
from rmjax.types import Array, Key, Memory, MemoryMachine, Params, at


class Costs(NamedTuple):
    """The costs of a memory machine, whatever the data.

    Attributes:
      state_floats: floating-point numbers in the memory of one stream.
      state_bytes: all bytes of that memory, counters and item ids included.
      parameters: of the machine and its reader, without the item table.
      item_parameters: of the item table; 0 if the machine has none.
      flops_per_item: operations that one item of a full segment costs when it is written in
        training, by `cost.flops`. They include the encoder, `write`, the machine's own loss, and
        dropout.
    """

    state_floats: int
    state_bytes: int
    parameters: int
    item_parameters: int
    flops_per_item: int


def costs_of(machine: MemoryMachine, segment_length: int, feature_width: int = 0) -> Costs:
    """Counts the costs of a machine. Only shapes are needed: nothing is compiled or run.

    XLA's own analysis counts the body of a loop only once, so it would make a machine that loops
    over items look cheap. Hence the operations are counted from the jaxpr.

    Args:
      machine: the machine.
      segment_length: items of a segment, N.
      feature_width: of items that are features; 0: items are ids.

    Returns:
      The costs.
    """
    params = jax.eval_shape(machine.init, jax.random.key(0))
    memory = jax.eval_shape(lambda params: machine.init_memory(params, 1), params)
    shape, features = (1, 1, segment_length), (feature_width,) if feature_width else ()
    dtype = jnp.float32 if feature_width else jnp.int32
    items, mask = jax.eval_shape(
        lambda: (jnp.zeros(shape + features, dtype), jnp.ones(shape, bool))
    )

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))

    def write(params: Params, memory: Memory, items: Array, mask: Array, key: Key) -> Memorized:
        return memorize(machine, params, items, mask, memory, key)

    table = 0 if machine.table is None else cost.parameter_count(at(params, machine.table))
    floats = [x for x in jax.tree.leaves(memory) if jnp.issubdtype(x.dtype, jnp.floating)]
    return Costs(
        state_floats=cost.parameter_count(floats),
        state_bytes=cost.tree_bytes(memory),
        parameters=cost.parameter_count(params) - table,
        item_parameters=table,
        flops_per_item=round(cost.flops(write, params, memory, items, mask, keys) / segment_length),
    )
