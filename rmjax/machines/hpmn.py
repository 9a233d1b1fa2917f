"""The hierarchical periodic memory network, HPMN (Ren et al. 2019): a stack of ever slower GRUs.

GRU l takes a step at every p^l-th item. Its input is the state of the GRU below. The memory is the
stack of states: the first follows the latest items, and the last one a long past.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import flax.struct
import jax
import jax.numpy as jnp

from rmjax.layers import recurrent
from rmjax.layers.embeddings import embed, init_items
from rmjax.reason import hops, unit
from rmjax.registry import at_least, one_of, setting
from rmjax.types import Array, Context, Key, MemoryMachine, Params, Sum


@flax.struct.dataclass
class HPMNMemory:
    """The memory of B streams."""

    hidden: Array  # f32 [B, L, d] states of the GRUs, the fastest first
    count: Array  # i32 [B] items so far; each row's own, so padding does not move the periods
    segments: Array  # i32 [B] segments written so far


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the HPMN machine."""

    dim: int = setting(64, at_least(1), "item width, d")
    levels: int = setting(10, at_least(1), "hpmn: GRUs in the stack, L; each is one slot")
    period: int = setting(2, at_least(1), "hpmn: a GRU takes one step in so many of the one below")
    covariance: float = setting(
        1e-5, at_least(0), "hpmn: weight of the loss that decorrelates the slots; 0: none"
    )
    reader: str = setting(
        "attention", one_of("attention", "own"), "reads the slots in hops, or as in the paper"
    )

    @property
    def ignores(self) -> dict[str, str]:
        """Keys that such a run does not read, see `rmjax.registry.Registry.ignored_by`."""
        return (
            dict.fromkeys(("reason.norm", "reason.mix"), "reader") if self.reader == "own" else {}
        )

    def conflicts(self, config: object = None) -> Iterator[str]:
        """Yields a message for each contradiction, see `rmjax.registry.Registry.settings`."""
        if self.period ** (self.levels - 1) >= 2**31:
            yield "{period} to the power of {levels} - 1 must be below 2^31, the largest count"


def make(num_items: int, settings: Settings, context: Context) -> MemoryMachine:
    """Builds the machine, see `rmjax.types.MemoryMachine`.

    The loss of the paper is taken of the last memory. Here it is the mean over the memories after
    all segments.
    """
    dim, levels, period = settings.dim, settings.levels, settings.period
    own = settings.reader == "own"

    def init(key: Key) -> Params:
        a, b, c = jax.random.split(key, 3)
        # Before training a state is a leaky average of the last `period` states of the GRU below.
        grus = [recurrent.init_gru(k, dim, dim, period) for k in jax.random.split(b, levels)]
        reader = init_reader(c, dim, context.hops) if own else hops.init(c, dim, dim, context)
        return init_items(a, num_items, dim, context.width) | {
            "grus": grus,
            "reader": reader,
        }

    def init_memory(params: Params, batch_size: int) -> HPMNMemory:
        count = jnp.zeros(batch_size, jnp.int32)
        return HPMNMemory(jnp.zeros((batch_size, levels, dim)), count, count)

    def encode(params: Params, items: Array, mask: Array, key: Key | None = None) -> Array:
        """Returns the input part of the first GRU's gates, which needs no memory."""
        return recurrent.gru_input(params["grus"][0], embed(params, items))

    def write(
        params: Params, memory: HPMNMemory, features: Array, mask: Array, key: Key | None = None
    ) -> tuple[HPMNMemory, Sum]:
        """Runs GRU after GRU over the segment; GRU l takes at most ceil(N / p^l) steps."""
        gates, steps, count, hidden = features, mask, memory.count, []
        for level, gru in enumerate(params["grus"]):
            last, states = recurrent.gru_scan(gru, memory.hidden[:, level], gates, steps)
            hidden.append(last)
            if level + 1 < levels:
                states, steps = every(states, steps, count, period)
                count = count // period
                gates = recurrent.gru_input(params["grus"][level + 1], states)
        new = HPMNMemory(jnp.stack(hidden, 1), memory.count + mask.sum(1), memory.segments)
        return new, aux(new.hidden, mask.any(1))

    def aux(hidden: Array, alive: Array) -> Sum:
        if not settings.covariance:
            return jnp.zeros(()), jnp.zeros(())
        loss = settings.covariance * jnp.where(alive, covariance(hidden), 0.0)
        return loss.sum(), alive.sum(dtype=jnp.float32)

    def slots(params: Params, memory: HPMNMemory) -> tuple[Array, Array]:
        return memory.hidden, memory.count[:, None] >= period ** jnp.arange(levels)

    def read(
        params: Params, memory: HPMNMemory, query: Array, query_mask: Array, key: Key | None = None
    ) -> Array:
        return own_read(params["reader"], query, *slots(params, memory))

    functions = init, init_memory, encode, write, slots, read if own else hops.reader(slots), embed
    return MemoryMachine(
        *functions,
        constant_size=True,
        gradient_range=None,
        table=("embed",) if num_items else None,
        has_loss=settings.covariance > 0,
    )


def every(states: Array, mask: Array, count: Array, period: int) -> tuple[Array, Array]:
    """Picks each p-th valid state of a stream, in a shorter sequence for the next GRU.

    Args:
      states: f32 [B, N, d], after each step.
      mask: bool [B, N], which of the steps were taken.
      count: i32 [B], steps taken before these.
      period: p.

    Returns:
      f32 [B, ceil(N / p), d], and their mask.
    """
    number = -(-states.shape[1] // period)
    # The steps that are picked, counted from 1 among the valid ones of this segment.
    rank = (period - count % period)[:, None] + period * jnp.arange(number)
    taken = jnp.cumsum(mask, 1)
    place = (taken[:, None] < rank[..., None]).sum(-1)
    picked = jnp.take_along_axis(states, place[..., None], 1, mode="clip")
    return picked, rank <= taken[:, -1:]


def covariance(hidden: Array) -> Array:
    """The covariance loss: the Frobenius norm of the covariances between different slots.

    Args:
      hidden: f32 [B, L, d].

    Returns:
      f32 [B].
    """
    centred = hidden - hidden.mean(-1, keepdims=True)
    products = centred @ centred.swapaxes(1, 2) / hidden.shape[-1]
    others = ~jnp.eye(hidden.shape[1], dtype=bool)
    return jnp.sqrt(jnp.where(others, products**2, 0.0).sum((1, 2)) + 1e-12)


def init_reader(key: Key, dim: int, number: int) -> Params:
    """Draws the parameters of `own_read`: an activation unit for each hop, and a shared map."""
    # Before training q^C is what was read. It lies in the space of the slots, as in `hops.init`.
    return {
        "query": jnp.eye(dim),
        "bias": jnp.zeros(dim),
        "units": [unit.init(k, dim) for k in jax.random.split(key, number)],
        "map": jnp.zeros((dim, dim)),
    }


def own_read(params: Params, query: Array, slots: Array, slot_mask: Array) -> Array:
    """The reader of the paper: q <- q H + sum_k a_k m_k in each hop; the paper has three hops.

    Args:
      params: of `init_reader`.
      query: f32 [B, Q, d].
      slots: f32 [B, L, d].
      slot_mask: bool [B, L].

    Returns:
      f32 [B, Q, d].
    """
    query = query @ params["query"] + params["bias"]
    for hop in params["units"]:
        query = query @ params["map"] + unit.attend(hop, query, slots, slot_mask, jax.nn.relu)
    return query
