"""An LSTM that reads and writes an external memory: what DNC, NUTM and DMSDNC share.

Each item makes one step. The controller sees the item and the last reads. From its output comes an
interface, which says what is written and what is read (Graves et al. 2016, Methods). Without links,
programs and blocks this is the DNC without its temporal link matrix.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.layers import addressing, recurrent
from rmjax.layers.embeddings import embed, init_items
from rmjax.machines.scan import where_rows
from rmjax.reason import hops
from rmjax.registry import at_least, setting
from rmjax.types import Array, Context, Key, MemoryMachine, Params, Sum


@flax.struct.dataclass
class MannMemory:
    """The memory of B streams: slots in G blocks of J = K / G, and the controller's state."""

    slots: Array  # f32 [B, G, J, d] M
    usage: Array  # f32 [B, G, J] u
    write_weights: Array  # f32 [B, G, J] w^w of the last item
    read_weights: Array  # f32 [B, G, R, J] w^r after the last item
    reads: Array  # f32 [B, R, d] r, summed over the blocks
    hidden: Array  # f32 [B, h] output of the LSTM
    cell: Array  # f32 [B, h] state of the LSTM
    segments: Array  # i32 [B] segments written so far


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of every machine with a controller and an external memory.

    Attributes:
      dim: width of items and of slots, d = W.
      slots: K.
      read_heads: R.
      hidden: width of the LSTM, h; 0: dim.
      normalize_hidden: the interface sees the LSTM's output with mean 0 and variance 1, as in
        DMSDNC's code and in Franke et al. 2018.
      hidden_slot: readers attend to the LSTM's output as one more slot. The papers drop it.
    """

    dim: int = setting(64, at_least(1), "item width, d")
    slots: int = setting(20, at_least(1), "memory slots, K")
    read_heads: int = setting(4, at_least(1), "read heads of an LSTM over a memory, R")
    hidden: int = setting(0, at_least(0), "width of that LSTM; 0: machine.dim")
    normalize_hidden: bool = setting(True, doc="normalizes that LSTM's output for the interface")
    hidden_slot: bool = setting(False, doc="readers see that LSTM's output as one more slot")

    def conflicts(self, config: object = None) -> Iterator[str]:
        """Yields a message for each contradiction, see `rmjax.registry.Registry.settings`."""
        if self.hidden_slot and self.hidden not in (0, self.dim):
            yield "{hidden_slot} needs slots as wide as the LSTM: {hidden} must be {dim}"


class Interface(NamedTuple):
    """What the controller asks of each block in one step."""

    read_keys: Array  # f32 [B, G, R, d]
    read_strengths: Array  # f32 [B, G, R]
    free: Array  # f32 [B, G, R] whether the slots that a head read may be used again
    extra: Array  # f32 [B, G, R, n] for `Access.look`
    write_key: Array  # f32 [B, G, 1, d]
    write_strength: Array  # f32 [B, G, 1]
    erase: Array  # f32 [B, G, d]
    value: Array  # f32 [B, G, d]
    allocate: Array  # f32 [B, G, 1] share of allocation in the write weights
    write: Array  # f32 [B, G, 1] whether anything is written


Outputs = tuple[Array, Array]  # h f32 [B, N, h] and r f32 [B, N, R d], after each item


def init_linear(key: Key, inputs: int, widths: tuple[int, int]) -> Params:
    """Draws one linear layer for the interface: {kernel: [inputs, n], bias: [n]}."""
    return {"kernel": lecun_normal()(key, (inputs, sum(widths))), "bias": jnp.zeros(sum(widths))}


def linear(params: Params, h: Array) -> Array:
    """The layer of `init_linear`: f32 [B, h] -> f32 [B, n]."""
    interface: Array = h @ params["kernel"] + params["bias"]
    return interface


def by_content(memory: MannMemory, content: Array, extra: Array) -> MannMemory:
    """Reads by content alone."""
    return dataclasses.replace(memory, read_weights=content)


class Access(NamedTuple):
    """What sets a machine apart. The defaults are a DNC without links."""

    blocks: int = 1
    """G, which divides the number of slots."""
    extra: int = 0
    """n, numbers that the interface has for `look`, for each block and head."""
    init: Callable[[Key, int, tuple[int, int]], Params] = init_linear
    """init(key, h, widths) -> parameters of `interface`; widths of the read part and write part."""
    interface: Callable[[Params, Array], Array] = linear
    """interface(params, h [B, h]) -> [B, sum of the widths], the read part first."""
    look: Callable[[MannMemory, Array, Array], MannMemory] = by_content
    """look(memory, content [B, G, R, J], extra [B, G, R, n]) -> memory with new read weights.

    In `memory` the slots, the usage and the write weights are already new.
    """
    loss: Callable[[Params, Outputs, Array, Array, Key | None], Sum] | None = None
    """loss(params, outputs, x [B, N, d], mask [B, N], key [B]) -> aux of `MemoryMachine.write`."""
    init_loss: Callable[[Key], Params] = lambda key: {}
    """init_loss(key) -> parameters of the loss alone, under their names in the machine's."""


def make(num_items: int, settings: Settings, context: Context, access: Access) -> MemoryMachine:
    """Builds a machine, see `rmjax.types.MemoryMachine`.

    Args:
      num_items: number of item ids. 0: the items are feature vectors.
      settings: of the kind.
      context: facts about the streams, such as their segment length.
      access: what sets the kind apart.

    Returns:
      The machine.
    """
    machine = _Mann(num_items, settings, context, access)
    return MemoryMachine(
        init=machine.init,
        init_memory=machine.init_memory,
        encode=machine.encode,
        write=machine.write,
        slots=machine.read_slots,
        read=hops.reader(machine.read_slots),
        embed=embed,
        constant_size=True,
        gradient_range=None,
        table=("embed",) if num_items else None,
        has_loss=access.loss is not None,
    )


@dataclasses.dataclass(frozen=True)
class _Mann:
    """The functions of a machine, over its settings."""

    num_items: int
    settings: Settings
    context: Context
    access: Access

    @property
    def hidden(self) -> int:
        """Width of the controller."""
        return self.settings.hidden or self.settings.dim

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of the interface's read part and write part, over all blocks."""
        s, blocks = self.settings, self.access.blocks
        return blocks * s.read_heads * (s.dim + 2 + self.access.extra), blocks * 3 * (s.dim + 1)

    def init(self, key: Key) -> Params:
        dim, heads, hidden = self.settings.dim, self.settings.read_heads, self.hidden
        a, b, c, d, e, f = jax.random.split(key, 6)
        return init_items(a, self.num_items, dim, self.context.width) | {
            "controller": recurrent.init_lstm(b, dim, hidden),
            "reads": lecun_normal()(c, (heads * dim, 4 * hidden)),
            "interface": self.access.init(d, hidden, self.widths),
            "reader": hops.init(e, dim, dim, self.context),
            **self.access.init_loss(f),
        }

    def init_memory(self, params: Params, batch_size: int) -> MannMemory:
        s, zeros = self.settings, jnp.zeros
        blocks = batch_size, self.access.blocks
        size = s.slots // self.access.blocks
        return MannMemory(
            slots=zeros((*blocks, size, s.dim)),
            usage=zeros((*blocks, size)),
            write_weights=zeros((*blocks, size)),
            read_weights=zeros((*blocks, s.read_heads, size)),
            reads=zeros((batch_size, s.read_heads, s.dim)),
            hidden=zeros((batch_size, self.hidden)),
            cell=zeros((batch_size, self.hidden)),
            segments=zeros(batch_size, jnp.int32),
        )

    def encode(
        self, params: Params, items: Array, mask: Array, key: Key | None = None
    ) -> tuple[Array, Array]:
        """Returns item features, and the part of the LSTM's gates that depends on them alone."""
        x = embed(params, items)
        return x, recurrent.lstm_input(params["controller"], x)

    def write(
        self,
        params: Params,
        memory: MannMemory,
        features: tuple[Array, Array],
        mask: Array,
        key: Key | None = None,
    ) -> tuple[MannMemory, Sum]:
        """Writes the items of a segment one by one; a masked item keeps the memory."""

        def item(memory: MannMemory, item: tuple[Array, Array]) -> tuple[MannMemory, Outputs]:
            gates, valid = item
            memory = where_rows(valid, self.step(params, memory, gates), memory)
            return memory, (memory.hidden, memory.reads.reshape(len(valid), -1))

        # Each item is computed again in the backward pass: that is faster, and needs less memory,
        # than to keep what its many small operations return.
        again = jax.checkpoint(item, prevent_cse=False)
        x, gates = features
        memory, outputs = jax.lax.scan(again, memory, (gates.swapaxes(0, 1), mask.T))
        if self.access.loss is None:
            return memory, (jnp.zeros(()), jnp.zeros(()))
        outputs = jax.tree.map(lambda y: y.swapaxes(0, 1), outputs)
        return memory, self.access.loss(params, outputs, x, mask, key)

    def step(self, params: Params, memory: MannMemory, gates: Array) -> MannMemory:
        """One step of the DNC: controller, interface, write, read."""
        gates = gates + memory.reads.reshape(len(gates), -1) @ params["reads"]
        hidden, cell = recurrent.lstm(params["controller"], memory.hidden, memory.cell, gates)
        output = jax.nn.standardize(hidden) if self.settings.normalize_hidden else hidden
        ask = self.split(self.access.interface(params["interface"], output))

        usage = addressing.update_usage(
            memory.usage, memory.write_weights, memory.read_weights, ask.free
        )
        alike = addressing.content(memory.slots, ask.write_key, ask.write_strength)[..., 0, :]
        free = addressing.allocate(usage)
        write_weights = ask.write * (ask.allocate * free + (1.0 - ask.allocate) * alike)
        slots = addressing.erase_and_add(memory.slots, write_weights, ask.erase, ask.value)

        memory = dataclasses.replace(
            memory,
            slots=slots,
            usage=usage,
            write_weights=write_weights,
            hidden=hidden,
            cell=cell,
        )
        alike = addressing.content(slots, ask.read_keys, ask.read_strengths)
        memory = self.access.look(memory, alike, ask.extra)
        return dataclasses.replace(memory, reads=(memory.read_weights @ slots).sum(1))

    def split(self, interface: Array) -> Interface:
        """Names the parts of the interface [B, n], and brings each into its range."""
        s, lead = self.settings, (len(interface), self.access.blocks)
        sigmoid, softplus = jax.nn.sigmoid, jax.nn.softplus
        read = interface[:, : self.widths[0]].reshape(*lead, s.read_heads, -1)
        write = interface[:, self.widths[0] :].reshape(*lead, -1)
        cut = functools.partial(jnp.split, axis=-1)
        keys, strengths, free, extra = cut(read, [s.dim, s.dim + 1, s.dim + 2])
        ends = [s.dim, 2 * s.dim, 3 * s.dim, 3 * s.dim + 1, 3 * s.dim + 2]
        key, erase, value, strength, allocate, gate = cut(write, ends)
        return Interface(
            read_keys=keys,
            read_strengths=1.0 + softplus(strengths[..., 0]),
            free=sigmoid(free[..., 0]),
            extra=extra,
            write_key=key[..., None, :],
            write_strength=1.0 + softplus(strength),
            erase=sigmoid(erase),
            value=value,
            allocate=sigmoid(allocate),
            write=sigmoid(gate),
        )

    def read_slots(self, params: Params, memory: MannMemory) -> tuple[Array, Array]:
        """Returns the slots of all blocks, see `MemoryMachine.slots`."""
        slots = memory.slots.reshape(len(memory.slots), -1, self.settings.dim)
        if self.settings.hidden_slot:
            slots = jnp.concatenate([slots, memory.hidden[:, None]], 1)
        return slots, jnp.ones(slots.shape[:2], bool)
