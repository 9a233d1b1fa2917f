"""K slots, written a segment at a time: segment encoder, slot-to-item attention, gated update.

RM (section 3.2) and CM (section 3.2) share everything except the update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal, normal

from rmjax.layers import segments
from rmjax.layers.attention import additive_scores, masked_softmax
from rmjax.layers.embeddings import embed, init_items
from rmjax.reason import hops
from rmjax.registry import above, at_least, below, one_of, setting
from rmjax.types import Array, Context, Key, MemoryMachine, Params, SegmentEncoder, Sum


@flax.struct.dataclass
class SlotMemory:
    """The memory M of B streams."""

    slots: Array  # f32 [B, K, d_m]
    segments: Array  # i32 [B] segments written so far


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of every slot machine.

    Attributes:
      dim: d_model.
      slots: K.
      layers: of the segment encoder.
      heads: of the segment encoder's attention.
      encoder: kind of the segment encoder.
      dropout: rate in the segment encoder.
      normalize: axis of the softmax in Eq. 1: over the slots, as RM prints it, or over the items.
      item_scale: scales the untrained W2 of Eq. 1. If it is larger, the item itself has more
        influence on which slots take it in. The slots then take in less of the part that all
        items share. Where items are as wide as the model, the untrained reader uses the same
        kernel for the question.
      slot_identity: Eq. 1 scores m_k plus the initial value of m_k, instead of m_k. Slots that
        receive nothing become equal; with this they still take in different items later (after
        the keys of EntNet, Henaff et al. 2017).
      timescale: segments that an untrained memory reaches back. With 0 all slots forget within a
        few segments, and become equal; see `recurrent.init_gru`.
    """

    takes_segment_encoder: ClassVar[bool] = True  # see `Context.segment_encoder`
    dim: int = setting(64, at_least(1), "item width, d")
    slots: int = setting(20, at_least(1), "memory slots, K")
    layers: int = setting(3, at_least(1), "layers of the segment encoder")
    heads: int = setting(4, at_least(1), "attention heads; divides machine.dim")
    encoder: str = setting("transformer", one_of("transformer", "bigru"), "the segment encoder")
    dropout: float = setting(0.0, below(0, 1), "dropout rate of the Transformer layers")
    normalize: str = setting("slots", one_of("slots", "items"), "axis of the softmax in Eq. 1")
    item_scale: float = setting(1.0, above(0), "factor of the untrained item kernel in Eq. 1")
    slot_identity: bool = setting(
        False, doc="Eq. 1 sees the initial value of each slot beside the present one"
    )
    timescale: int = setting(
        50,
        at_least(0),
        "segments that an untrained memory reaches back; 0: about two items; in machines of "
        "segment slots about two segments",
    )

    @property
    def ignores(self) -> dict[str, str]:
        """Keys that such a run does not read, see `rmjax.registry.Registry.ignored_by`."""
        unread = "machine.layers", "machine.dropout"
        return dict.fromkeys(unread, "encoder") if self.encoder == "bigru" else {}

    def conflicts(self, config: object = None) -> Iterator[str]:
        """Yields a message for each contradiction, see `rmjax.registry.Registry.settings`."""
        if self.dim % self.heads:
            yield "{heads} must divide {dim}"
        if self.encoder == "bigru" and self.dim % 2:
            yield "{dim} must be even: each direction of a bidirectional GRU has half of it"


class Update(NamedTuple):
    """How the slots change after Eq. 1: RM Eq. 2, or CM Eqs. 2 and 3."""

    init: Callable[[Key], Params]
    """init(key) -> parameters."""
    apply: Callable[[Params, Array, Array], Array]
    """apply(params, m, l) -> new m.

    m is f32 [B, K, d_m], the slots; l is f32 [B, K, d_x], the aligned features of Eq. 1.
    """


class Widths(NamedTuple):
    """The three widths of the papers."""

    model: int  # d_model
    items: int  # d_x
    slots: int  # d_m


def make(
    num_items: int, settings: Settings, context: Context, widths: Widths, update: Update
) -> MemoryMachine:
    """Builds a slot machine, see `rmjax.types.MemoryMachine`.

    Args:
      num_items: number of item ids. 0: the items are feature vectors.
      settings: of the kind.
      context: facts about the streams, such as their segment length.
      widths: d_model, d_x and d_m.
      update: how the slots change, given their aligned features.

    Returns:
      The machine.
    """
    s = settings
    if context.segment_encoder:
        encoder = context.segment_encoder
    elif s.encoder == "bigru":
        encoder = segments.bigru()
    else:
        encoder = segments.transformer(s.layers, s.heads, s.dropout, context.dtype)
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
    """The functions of a slot machine, over its settings."""

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
            "slot": dense(keys[3], (slot_dim, dim)),  # W1 of Eq. 1
            "item": s.item_scale * dense(keys[4], (item_dim, dim)),  # W2
            "bias": jnp.zeros(dim),  # b
            # w; the factor makes the softmax sharp enough that slots take in different items.
            "score": 4.0 * dense(keys[5], (dim, 1))[:, 0],
        }
        reader = hops.init(keys[7], slot_dim, dim, self.context)
        # Before training a question reads the slots that take in items like it.
        shared = {"query": attention["item"]} if item_dim == dim else {}
        shared |= {"slot": attention["slot"], "score": attention["score"]}
        reader["hops"] = [hop | jax.tree.map(jnp.copy, shared) for hop in reader["hops"]]
        return init_items(keys[1], self.num_items, item_dim, self.context.width) | {
            "encoder": self.encoder.init(keys[0], item_dim, self.context.segment_length),
            # Not zeros: Eqs. 1 and 2 are symmetric in k, so equal slots would stay equal for ever.
            "slots": normal(1.0)(keys[2], (s.slots, slot_dim)),
            "attention": attention,
            "update": self.update.init(keys[6]),
            "reader": reader,
        }

    def init_memory(self, params: Params, batch_size: int) -> SlotMemory:
        shape = batch_size, self.settings.slots, self.widths.slots
        first = jnp.broadcast_to(params["slots"], shape)
        return SlotMemory(first, jnp.zeros(batch_size, jnp.int32))

    def encode(
        self, params: Params, items: Array, mask: Array, key: Key | None = None
    ) -> tuple[Array, Array]:
        """Returns features f, and W2 f + b of Eq. 1, which needs no memory: it leaves the scan."""
        f = self.encoder.apply(params["encoder"], items, embed(params, items), mask, key=key)
        return f, f @ params["attention"]["item"] + params["attention"]["bias"]

    def write(
        self,
        params: Params,
        memory: SlotMemory,
        features: tuple[Array, Array],
        mask: Array,
        key: Key | None = None,
    ) -> tuple[SlotMemory, Sum]:
        """Writes one segment: M^t, F^t -> M^(t+1)."""
        del key  # nothing is drawn in the scan
        f, projected = features
        m = memory.slots
        scored = m + params["slots"] if self.settings.slot_identity else m
        normalize = self.settings.normalize
        weights = slot_attention(params["attention"], scored, projected, mask, normalize)
        aligned = weights @ jnp.where(mask[..., None], f, 0.0)  # RM Eq. 1, CM Eq. 1: l_k
        new = self.update.apply(params["update"], m, aligned)  # RM Eq. 2; CM Eqs. 2 and 3
        return SlotMemory(new, memory.segments), (jnp.zeros(()), jnp.zeros(()))


def read_slots(params: Params, memory: SlotMemory) -> tuple[Array, Array]:
    """Returns the slots and their mask, see `MemoryMachine.slots`; no slot is ever empty."""
    return memory.slots, jnp.ones(memory.slots.shape[:2], bool)


read = hops.reader(read_slots)


def slot_attention(
    params: Params, slots: Array, projected: Array, mask: Array, normalize: str = "slots"
) -> Array:
    """Returns the weights of RM Eq. 1 (CM Eq. 1): the share of each item that each slot takes in.

    Args:
      params: the 'attention' part of the machine's parameters.
      slots: f32 [B, K, d_m]. With `slot_identity`, the machine's params['slots'] are added first.
      projected: f32 [B, N, d_model], W2 f + b. `encode` returns it as its second feature.
      mask: bool [B, N].
      normalize: axis of the softmax: 'slots' as printed, or 'items'.

    Returns:
      f32 [B, K, N].
    """
    scores = additive_scores(slots @ params["slot"], projected, params["score"])
    if normalize == "slots":
        return jnp.where(mask[:, None], jax.nn.softmax(scores, 1), 0.0)
    return masked_softmax(scores, mask[:, None], 2)
