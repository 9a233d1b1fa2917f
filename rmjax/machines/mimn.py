"""The multi-channel user interest memory network, MIMN (Pi et al. 2019).

A neural Turing machine (Graves et al. 2014) writes each item to its slots. Utilisation
regularisation spreads the writes over the slots. Memory induction adds a GRU for each slot: it
reads the items that belong to the slot.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal, normal

from rmjax.layers import addressing, recurrent
from rmjax.layers.embeddings import embed, init_items
from rmjax.machines.gru import running_mean
from rmjax.machines.scan import scan_items
from rmjax.reason import hops, unit
from rmjax.registry import at_least, one_of, setting
from rmjax.types import Array, Context, Key, MemoryMachine, Params, Sum

LARGEST = 20.0  # controls and outputs of the cell are clipped to this size
SHARPNESS = 2.0  # factor of the strengths and, twice, of the power


@flax.struct.dataclass
class MIMNMemory:
    """The memory of B streams."""

    slots: Array  # f32 [B, K, d], M
    read: Array  # f32 [B, d], r, what the last item read
    hidden: Array  # f32 [B, d], h, state of the controller
    added: Array  # f32 [B, K, d], sum of all that was added to each slot
    usage: Array  # f32 [B, K], sum of the write weights; zeros without utilisation
    channels: Array  # f32 [B, K, d], states of the induction GRU; zeros without induction
    steps: Array  # i32 [B, K] steps that each channel took
    history: Array  # f32 [B, d] mean of all item features so far
    count: Array  # f32 [B] number of items in that mean
    segments: Array  # i32 [B] segments written so far


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the MIMN machine."""

    dim: int = setting(64, at_least(1), "item width, d")
    slots: int = setting(20, at_least(1), "memory slots, K")
    utilization: float = setting(
        1e-3, at_least(0), "mimn: weight of the loss that spreads the writes; 0: nothing does"
    )
    induction: bool = setting(True, doc="mimn: a GRU for each slot, whose states are slots too")
    reader: str = setting(
        "attention", one_of("attention", "own"), "reads the slots in hops, or as in the paper"
    )

    @property
    def ignores(self) -> dict[str, str]:
        """Keys that such a run does not read, see `rmjax.registry.Registry.ignored_by`."""
        return {"reason.hops": "reader"} if self.reader == "own" else {}


class Features(NamedTuple):
    """What `write` reads of items [...]; it does not depend on the memory."""

    item: Array  # f32 [..., d]
    gates: Array  # f32 [..., 3d], the item's part of the controller's gates
    channel_gates: Array | None  # f32 [..., 3d], the same of the induction GRU


class Controls(NamedTuple):
    """What the controller tells the memory."""

    keys: Array  # f32 [..., 2, d], of reading and writing
    strengths: Array  # f32 [..., 2]
    shift: Array  # f32 [..., 3], which sums to 1: by one slot onwards, none, and one back
    power: Array  # f32 [..., 1]
    erase: Array  # f32 [..., d]
    add: Array  # f32 [..., d]


def make(num_items: int, settings: Settings, context: Context) -> MemoryMachine:
    """Builds the machine, see `rmjax.types.MemoryMachine`.

    With induction the states of the K channels are further slots, once they took a step. The
    reader of the paper attends to all channels, as in the released code. The first slots are small
    random numbers that are not trained, as there.

    The loss of the paper is taken of the last memory. Here it is the mean over the memories after
    all segments. The released code divides by the size of the batch once more. Here the loss does
    not depend on that size.
    """
    dim, number, own = settings.dim, settings.slots, settings.reader == "own"
    cell = Cell(settings.utilization > 0, settings.induction, max(context.max_items, 1))

    def init(key: Key) -> Params:
        a, b, c = jax.random.split(key, 3)
        if own:
            reader = init_reader(c, dim, cell.induction)
        else:
            reader = hops.init(c, dim, dim, context)
        return init_items(a, num_items, dim, context.width) | {
            "cell": cell.init(b, dim, number),
            "reader": reader,
        }

    def init_memory(params: Params, batch_size: int) -> MIMNMemory:
        return empty_memory(params["cell"], batch_size)

    def encode(params: Params, items: Array, mask: Array, key: Key | None = None) -> Features:
        x, p = embed(params, items), params["cell"]
        channel_gates = item_gates(p["channel"], x) if cell.induction else None
        return Features(x, item_gates(p["controller"], x), channel_gates)

    def write(
        params: Params, memory: MIMNMemory, features: Features, mask: Array, key: Key | None = None
    ) -> tuple[MIMNMemory, Sum]:
        step = functools.partial(cell.step, params["cell"])
        new = scan_items(step, memory, features, mask)
        mean = running_mean(memory.history, memory.count, features.item, mask)
        new = dataclasses.replace(new, history=mean[0], count=mean[1])
        return new, aux(new.usage, mask.any(1))

    def aux(usage: Array, alive: Array) -> Sum:
        if not cell.utilization:
            return jnp.zeros(()), jnp.zeros(())
        loss = settings.utilization * jnp.where(alive, usage.var(-1) / number, 0.0)
        return loss.sum(), alive.sum(dtype=jnp.float32)

    def slots(params: Params, memory: MIMNMemory) -> tuple[Array, Array]:
        every = jnp.ones(memory.slots.shape[:2], bool)
        if not cell.induction:
            return memory.slots, every
        both = jnp.concatenate([memory.slots, memory.channels], 1)
        return both, jnp.concatenate([every, memory.steps > 0], 1)

    def read(
        params: Params, memory: MIMNMemory, query: Array, query_mask: Array, key: Key | None = None
    ) -> Array:
        return own_read(cell, params, memory, query)

    functions = init, init_memory, encode, write, slots, read if own else hops.reader(slots), embed
    return MemoryMachine(
        *functions,
        constant_size=True,
        gradient_range=None,
        table=("embed",) if num_items else None,
        has_loss=cell.utilization,
    )


def empty_memory(cell: Params, batch_size: int) -> MIMNMemory:
    """The memory of B empty streams; its first slots are not trained."""
    first, read = jax.lax.stop_gradient(cell["slots"]), jnp.tanh(cell["read"])
    sums = jnp.zeros((batch_size, *first.shape))
    zeros = sums[:, 0]
    return MIMNMemory(
        slots=jnp.broadcast_to(first, sums.shape),
        read=jnp.broadcast_to(read, zeros.shape),
        hidden=zeros,
        added=sums,
        usage=sums[..., 0],
        channels=sums,
        steps=jnp.zeros(sums.shape[:2], jnp.int32),
        history=zeros,
        count=zeros[:, 0],
        segments=jnp.zeros(batch_size, jnp.int32),
    )


@dataclasses.dataclass(frozen=True)
class Cell:
    """The recurrent cell of MIMN.

    Attributes:
      utilization: whether write weights are re-balanced.
      induction: whether each slot has a channel.
      capacity: items of the longest stream; the controller sees the usage as a share of them.
    """

    utilization: bool
    induction: bool
    capacity: int

    def init(self, key: Key, dim: int, number: int) -> Params:
        """Draws the parameters of the cell, for `number` slots of width `dim`."""
        keys, dense = jax.random.split(key, 6), lecun_normal()
        inputs = dim + number if self.utilization else dim
        outputs = 4 * dim + 6
        induction = {"channel": recurrent.init_gru(keys[5], 2 * dim, dim)}
        return (induction if self.induction else {}) | {
            "controller": recurrent.init_gru(keys[0], 2 * dim, dim),
            "controls": dense(keys[1], (inputs, outputs)),
            "controls_bias": jnp.zeros(outputs),
            "slots": normal(1e-5)(keys[2], (number, dim)),
            "read": jnp.zeros(dim),
            "keys": normal(0.5)(keys[3], (number, dim)),  # key_M before its tanh
        }

    def step(self, params: Params, memory: MIMNMemory, x: Features) -> MIMNMemory:
        """Writes one item.

        Args:
          params: of `init`.
          memory: of B streams.
          x: features of [B] items.

        Returns:
          The memory; its history is left as it is.
        """
        hidden = controller(params, memory.hidden, memory.read, x.gates)
        c = self.controls(params, hidden, memory.usage)
        weights = address(params, memory.slots[:, None], c.keys, c.strengths)
        read_weights, weights = weights[:, 0], weights[:, 1]
        usage = memory.usage
        if self.utilization:
            weights = rebalance(weights, c.shift, c.power)
            # As in the released code the sum takes in weights that are re-balanced once more, so
            # that the loss teaches the shift and the power alone.
            usage = usage + rebalance(jax.lax.stop_gradient(weights), c.shift, c.power)
        write = weights[..., None]  # [B, K, 1]
        add = c.add[:, None]
        memory = self.induce(params, memory, x, read_weights)
        return dataclasses.replace(
            memory,
            slots=memory.slots * (1.0 - write * c.erase[:, None]) + write * add,
            read=jnp.einsum("bk,bkd->bd", read_weights, memory.slots),
            hidden=hidden,
            added=memory.added + jax.lax.stop_gradient(write) * add,
            usage=usage,
        )

    def induce(self, params: Params, memory: MIMNMemory, x: Features, weights: Array) -> MIMNMemory:
        """Lets the channel of the largest read weight take a step."""
        if not self.induction:
            return memory
        row, largest = jnp.arange(len(weights)), weights.argmax(-1)
        gru, slot = params["channel"], jax.lax.stop_gradient(memory.slots[row, largest])
        gates = x.channel_gates + slot @ gru["input"][slot.shape[-1] :]
        new = recurrent.gru(gru, memory.channels[row, largest], gates)
        channels = memory.channels.at[row, largest].set(new)
        return dataclasses.replace(
            memory, channels=channels, steps=memory.steps.at[row, largest].add(1)
        )

    def controls(self, params: Params, hidden: Array, usage: Array) -> Controls:
        """The controls f32 [..., 4d + 6] from hidden f32 [..., d] and usage f32 [..., K]."""
        if self.utilization:
            share = jax.lax.stop_gradient(usage) / self.capacity
            hidden = jnp.concatenate([hidden, share], -1)
        raw = hidden @ params["controls"] + params["controls_bias"]
        raw = raw.clip(-LARGEST, LARGEST)
        dim = (raw.shape[-1] - 6) // 4
        sizes = 2 * dim, 2, 3, 1, dim
        cuts = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        keys, strengths, shift, power, erase, add = jnp.split(raw, cuts, -1)
        return Controls(
            keys=jnp.tanh(keys).reshape(*keys.shape[:-1], 2, dim),
            strengths=SHARPNESS * (1.0 + jax.nn.softplus(strengths)),
            shift=jax.nn.softmax(shift),
            power=2.0 * SHARPNESS * (1.0 + jax.nn.softplus(power)),
            erase=jax.nn.sigmoid(erase),
            add=jnp.tanh(add),
        )


def item_gates(gru: Params, x: Array) -> Array:
    """The part of a GRU's gates that x f32 [..., d] gives, if its input is [x; another vector]."""
    return recurrent.gru_input(gru | {"input": gru["input"][: x.shape[-1]]}, x)


def controller(params: Params, hidden: Array, read: Array, gates: Array) -> Array:
    """The controller's next state f32 [..., d], from [x; r]; `item_gates` made the part of x."""
    gru = params["controller"]
    return recurrent.gru(gru, hidden, gates + read @ gru["input"][read.shape[-1] :])


def address(params: Params, slots: Array, keys: Array, strengths: Array) -> Array:
    """The weights of slots: a softmax of strength * (cos(key, key_M) + cos(key, M)) / 2.

    Args:
      params: of `Cell.init`.
      slots: f32 [..., K, d].
      keys: f32 [..., d], whose leading axes broadcast with those of the slots.
      strengths: f32 [...].

    Returns:
      f32 [..., K].
    """
    one = keys[..., None, :]
    similar = addressing.cosine(jnp.tanh(params["keys"]), one) + addressing.cosine(slots, one)
    return jax.nn.softmax(strengths[..., None] * similar[..., 0, :] / 2.0)


def rebalance(weights: Array, shift: Array, power: Array) -> Array:
    """Shifts weights along the circle of slots, and raises them to a power.

    Args:
      weights: f32 [..., K].
      shift: f32 [..., 3].
      power: f32 [..., 1].

    Returns:
      f32 [..., K], which sums to 1.
    """
    ways = [jnp.roll(weights, step, -1) for step in (1, 0, -1)]
    moved = (jnp.stack(ways, -1) * shift[..., None, :]).sum(-1)
    # The softmax of logarithms equals powers divided by their sum, which may all be too small.
    return jax.nn.softmax(power * jnp.log(moved + 1e-12))


def init_reader(key: Key, dim: int, induction: bool) -> Params:
    """Draws the parameters of `own_read`."""
    a, b, c = jax.random.split(key, 3)
    parts, dense = 5 if induction else 4, lecun_normal()
    # The mean of all items lies in the space of the items, so the head can compare it.
    merge = dense(c, (parts * dim, dim)).at[dim : 2 * dim].set(jnp.eye(dim))
    return {
        "out": dense(a, (2 * dim, dim)),
        "out_bias": jnp.zeros(dim),
        "unit": unit.init(b, dim),
        "merge": merge,
        "merge_bias": jnp.zeros(dim),
    }


def own_read(cell: Cell, params: Params, memory: MIMNMemory, query: Array) -> Array:
    """The reader of the paper: the cell sees the question as one more item, and writes nothing.

    A linear layer reads the question, the mean of all items, and the cell's output. It also reads
    the question times what was added to the slots, and what an activation unit reads of the
    channels. The paper takes sums over the items. Here they are means, which do not grow with the
    stream.

    Args:
      cell: of the machine.
      params: of the machine.
      memory: of B streams.
      query: f32 [B, Q, d].

    Returns:
      f32 [B, Q, d].
    """
    p, reader = params["cell"], params["reader"]
    state = memory.hidden, memory.read, memory.usage, memory.history
    hidden, read, usage, history = (
        jnp.broadcast_to(x[:, None], (*query.shape[:2], x.shape[-1])) for x in state
    )
    hidden = controller(p, hidden, read, item_gates(p["controller"], query))
    c = cell.controls(p, hidden, usage)
    weights = address(p, memory.slots[:, None], c.keys[..., 0, :], c.strengths[..., 0])
    out = jnp.concatenate([hidden, weights @ memory.slots], -1) @ reader["out"]
    out = (out + reader["out_bias"]).clip(-LARGEST, LARGEST)
    added = memory.added.mean(1) / jnp.maximum(memory.count, 1.0)[:, None]
    parts = [query, history, out, query * added[:, None]]
    if cell.induction:
        every = jnp.ones(memory.channels.shape[:2], bool)
        parts.append(unit.attend(reader["unit"], query, memory.channels, every, jax.nn.sigmoid))
    answer: Array = jnp.concatenate(parts, -1) @ reader["merge"] + reader["merge_bias"]
    return answer
