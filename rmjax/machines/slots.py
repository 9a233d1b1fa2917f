"""K slots written a segment at a time: segment encoder, slot-to-item attention, and an update of the machine's own.

RM (section 3.2) and CM (section 3.2) share all but the update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal, normal

from rmjax.layers import segments
from rmjax.layers.attention import additive_scores, masked_softmax
from rmjax.layers.embeddings import embed, init_items
from rmjax.reason import hops
from rmjax.registry import above, at_least, below, one_of, setting
from rmjax.types import Array, Context, Key, MemoryMachine, Params, SegmentEncoder


@flax.struct.dataclass
class SlotMemory:
    slots: Array  # f32 [B, K, d_m]
    segments: Array  # i32 [B] written so far


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of all machines of slots.

    slot_identity: Eq. 1 scores m_k plus what m_k was at first, in the place of m_k. Slots that nothing is written to,
    and that so come to be the same, still differ in what they would take in (after the keys of EntNet, Henaff et al.
    2017). item_scale: the larger the untrained W2 of Eq. 1, the more it is the item that decides which slots take it
    in, and the less what they take of all items alike. Where items are as wide as the model, the untrained reader's
    kernel of the question is as large. timescale: without it all slots forget within a few segments, and come to be
    the same; see `recurrent.init_gru`.
    """

    dim: int = setting(64, at_least(1), "item width, d")
    slots: int = setting(20, at_least(1), "memory slots, K")
    layers: int = setting(3, at_least(1), "layers of the segment encoder")
    heads: int = setting(4, at_least(1), "attention heads; divides machine.dim")
    encoder: str = setting("transformer", one_of("transformer", "bigru"), "the segment encoder")
    dropout: float = setting(0.0, below(0, 1), "dropout rate of the Transformer layers")
    normalize: str = setting("slots", one_of("slots", "items"), "what Eq. 1 normalises over")
    item_scale: float = setting(
        1.0, above(0), "untrained kernel of the items in Eq. 1, times the usual"
    )
    slot_identity: bool = setting(
        False, doc="Eq. 1 sees what each slot was at first beside what it is"
    )
    timescale: int = setting(
        50, at_least(0), "segments that an untrained memory reaches back; 0: about two"
    )

    def conflicts(self, config: Any = None) -> Iterator[str]:
        if self.dim % self.heads:
            yield "{heads} must divide {dim}"
        if self.encoder == "bigru" and self.dim % 2:
            yield "{dim} must be even: a bidirectional GRU has half of it each way"


class Update(NamedTuple):
    """What becomes of the slots m [B, K, d_m], given each one's share l [B, K, d_x] of a segment."""

    init: Callable[[Key], Params]
    """init(key) -> params"""
    apply: Callable[[Params, Array, Array], Array]
    """apply(params, m, l) -> new m"""


class Widths(NamedTuple):
    """Of the model, of items and of slots: d_model, d_x, d_m."""

    model: int
    items: int
    slots: int


def make(
    num_items: int, settings: Settings, context: Context, widths: Widths, update: Update
) -> MemoryMachine:
    """A machine of slots over `num_items` item ids, or over features."""
    encoder = context.segment_encoder or (
        segments.bigru()
        if settings.encoder == "bigru"
        else segments.transformer(settings.layers, settings.heads, settings.dropout, context.dtype)
    )
    machine = _Slots(num_items, settings, context, widths, update, encoder)
    return MemoryMachine(
        init=machine.init,
        init_memory=machine.init_memory,
        encode=machine.encode,
        write=machine.write,
        slots=read_slots,
        read=read,
        embed=embed,
        constant_size=True,
        gradient_range=None,
        table=("embed",) if num_items else None,
    )


@dataclasses.dataclass(frozen=True)
class _Slots:
    num_items: int
    settings: Settings
    context: Context
    widths: Widths
    update: Update
    encoder: SegmentEncoder

    def init(self, key: Key) -> Params:
        s, (dim, item_dim, slot_dim) = self.settings, self.widths
        keys, dense = jax.random.split(key, 8), lecun_normal()
        attention = {
            "slot": dense(keys[3], (slot_dim, dim)),
            "item": s.item_scale * dense(keys[4], (item_dim, dim)),
            "bias": jnp.zeros(dim),
            "score": 4.0
            * dense(keys[5], (dim, 1))[:, 0],  # sharp enough that slots differ in what they take in
        }
        reader = hops.init(keys[7], slot_dim, dim, self.context.hops)
        # Untrained, a question reads the slots that an item like it is written to.
        find = {"query": attention["item"]} if item_dim == dim else {}
        find |= {"slot": attention["slot"], "score": attention["score"]}
        reader["hops"] = [hop | jax.tree.map(jnp.copy, find) for hop in reader["hops"]]
        return init_items(keys[1], self.num_items, item_dim, self.context.width) | {
            "encoder": self.encoder.init(keys[0], item_dim, self.context.segment_length),
            # From zeros all slots would stay alike for ever: Eq. 1 and 2 are symmetric in k.
            "slots": normal(1.0)(keys[2], (s.slots, slot_dim)),
            "attention": attention,
            "update": self.update.init(keys[6]),
            "reader": reader,
        }

    def init_memory(self, params: Params, batch_size: int) -> SlotMemory:
        first = jnp.broadcast_to(
            params["slots"], (batch_size, self.settings.slots, self.widths.slots)
        )
        return SlotMemory(first, jnp.zeros(batch_size, jnp.int32))

    def encode(
        self, params: Params, items: Array, mask: Array, key: Key | None = None
    ) -> tuple[Array, Array]:
        """-> features f, and W2 f + b of Eq. 1, which needs no memory and so is kept out of the scan."""
        f = self.encoder.apply(params["encoder"], items, embed(params, items), mask, key=key)
        return f, f @ params["attention"]["item"] + params["attention"]["bias"]

    def write(
        self,
        params: Params,
        memory: SlotMemory,
        features: tuple[Array, Array],
        mask: Array,
        key: Key | None = None,
    ):
        del key  # nothing is drawn in the scan
        f, projected = features
        m = memory.slots
        scored = m + params["slots"] if self.settings.slot_identity else m
        weights = slot_attention(
            params["attention"], scored, projected, mask, self.settings.normalize
        )
        aligned = weights @ jnp.where(mask[..., None], f, 0.0)  # Eq. 1: l_k
        new = self.update.apply(params["update"], m, aligned)
        return SlotMemory(new, memory.segments), (jnp.zeros(()), jnp.zeros(()))


def read_slots(params: Params, memory: SlotMemory) -> tuple[Array, Array]:
    return memory.slots, jnp.ones(memory.slots.shape[:2], bool)


def read(
    params: Params, memory: SlotMemory, query: Array, query_mask: Array, key: Key | None = None
) -> Array:
    return hops.multihop(params["reader"], query, *read_slots(params, memory))[0]


def slot_attention(
    params: Params, slots: Array, projected: Array, mask: Array, normalize: str = "slots"
) -> Array:
    """Eq. 1's weights, the share of each item that each slot takes in.

    Args:
      params: the machine's 'attention'.
      slots: f32 [B, K, d_m]. A machine with `slot_identity` adds its params['slots'] first.
      projected: f32 [B, N, d_model], W2 f + b, the second part of the features that `encode` gives.
      mask: bool [B, N].
      normalize: what the softmax runs over, 'slots' as printed, or 'items'.

    Returns:
      f32 [B, K, N].
    """
    scores = additive_scores(slots @ params["slot"], projected, params["score"])
    if normalize == "slots":
        return jnp.where(mask[:, None], jax.nn.softmax(scores, 1), 0.0)
    return masked_softmax(scores, mask[:, None], 2)
