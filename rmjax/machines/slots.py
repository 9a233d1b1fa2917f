"""K slots written a segment at a time: segment encoder, slot-to-item attention, and an update of the machine's own.

RM (section 3.2) and CM (section 3.2) share all but the update.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast

import flax.struct
import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal, normal

from rmjax.layers import recurrent
from rmjax.layers.attention import additive_scores, masked_softmax
from rmjax.layers.embeddings import embed, init_items
from rmjax.layers.transformer import Transformer
from rmjax.machines.scan import inert
from rmjax.reason import multihop
from rmjax.types import Array, Key, MemoryMachine, Params


@flax.struct.dataclass
class SlotMemory:
    slots: Array  # f32 [B, K, d_m]
    segments: Array  # i32 [B] written so far


class Initialise(Protocol):
    def __call__(self, key: Key) -> Params: ...


class Apply(Protocol):
    def __call__(self, params: Params, slots: Array, aligned: Array) -> Array: ...


class Update(NamedTuple):
    """What becomes of the slots m [B, K, d_m], given each one's share l [B, K, d_x] of a segment."""

    init: Initialise
    apply: Apply


def make(
    num_items: int,
    update: Update,
    *,
    dim: int,
    item_dim: int = 0,
    slot_dim: int = 0,
    slots: int = 20,
    layers: int = 3,
    heads: int = 4,
    encoder: str = "transformer",
    dropout: float = 0.0,
    normalize: str = "slots",
    slot_identity: bool = False,
    item_scale: float = 1.0,
    hops: int = 1,
    segment_length: int = 20,
    width: int = 0,
    dtype: jnp.dtype = jnp.float32,
) -> MemoryMachine:
    """The machine over `num_items` item ids, d_model = `dim`, d_x = `item_dim`, d_m = `slot_dim` (0: as `dim`).

    encoder: 'transformer', or 'bigru' (RM Table 6). normalize: what Eq. 1's softmax runs over, 'slots' as printed,
    or 'items'. slot_identity: Eq. 1 scores m_k plus what m_k was at first, in place of m_k: slots that nothing is
    written to, and that so come to be the same, still differ in what they would take in (after the keys of EntNet,
    Henaff et al. 2017). item_scale: the untrained W2 of Eq. 1 is so many times the usual; the larger, the more it is
    the item that decides which slots take it in, and the less what they take of all items alike. Where item_dim == dim
    the untrained reader's kernel of the question is as large.
    segment_length: the transformer has so many positions; a shorter segment uses the first ones, and a longer one is a
    ValueError when the call is traced. The 'bigru' takes any length.
    width: see `embeddings.init_items`. dtype: of the encoder's products; slots stay f32. Errors: ValueError
    naming the argument.
    """
    item_dim, slot_dim = item_dim or dim, slot_dim or dim
    if encoder not in ("transformer", "bigru"):
        raise ValueError(f"encoder must be 'transformer' or 'bigru', got {encoder!r}")
    if normalize not in ("slots", "items"):
        raise ValueError(f"normalize must be 'slots' or 'items', got {normalize!r}")
    if item_dim % heads:
        raise ValueError(f"items of width {item_dim} do not divide among heads {heads}")
    transformer = Transformer(layers, heads, dropout, dtype)

    def init(key: Key) -> Params:
        keys = jax.random.split(key, 8)
        if encoder == "transformer":
            x, mask = jnp.zeros((1, 1, segment_length, item_dim)), jnp.ones((1, 1, segment_length), bool)
            encode_params = transformer.init(keys[0], x, mask)["params"]
        else:
            encode_params = recurrent.init_bigru(keys[0], item_dim, item_dim)
        dense = lecun_normal()
        attention = {
            "slot": dense(keys[3], (slot_dim, dim)),
            "item": item_scale * dense(keys[4], (item_dim, dim)),
            "bias": jnp.zeros(dim),
            "score": 4.0 * dense(keys[5], (dim, 1))[:, 0],  # sharp enough that slots differ in what they take in
        }
        reader = multihop.init(keys[7], slot_dim, dim, hops)
        # Untrained, a question reads the slots that an item like it is written to.
        find = {"query": attention["item"]} if item_dim == dim else {}
        find |= {"slot": attention["slot"], "score": attention["score"]}
        reader["hops"] = [hop | jax.tree.map(jnp.copy, find) for hop in reader["hops"]]
        return init_items(keys[1], num_items, item_dim, width) | {
            "encoder": encode_params,
            # From zeros all slots would stay alike for ever: Eq. 1 and 2 are symmetric in k.
            "slots": normal(1.0)(keys[2], (slots, slot_dim)),
            "attention": attention,
            "update": update.init(keys[6]),
            "reader": reader,
        }

    def init_memory(params: Params, batch_size: int) -> SlotMemory:
        first = jnp.broadcast_to(params["slots"], (batch_size, slots, slot_dim))
        return SlotMemory(first, jnp.zeros(batch_size, jnp.int32))

    def encode(params: Params, items: Array, mask: Array, key: Key | None = None) -> tuple[Array, Array]:
        """-> features f, and W2 f + b of Eq. 1, which needs no memory and so is kept out of the scan."""
        x = embed(params, items)
        if encoder == "transformer":
            f = cast(Array, transformer.apply({"params": params["encoder"]}, x, mask, key=key))
        else:
            rows = recurrent.bigru(params["encoder"], x.reshape(-1, *x.shape[-2:]), mask.reshape(-1, mask.shape[-1]))
            f = rows[0].reshape(x.shape)
        return f, f @ params["attention"]["item"] + params["attention"]["bias"]

    def write(params: Params, memory: SlotMemory, features: tuple[Array, Array], mask: Array, key: Key | None = None):
        del key  # nothing is drawn in the scan
        f, projected = features
        m = memory.slots
        scored = m + params["slots"] if slot_identity else m
        weights = slot_attention(params["attention"], scored, projected, mask, normalize)
        aligned = weights @ jnp.where(mask[..., None], f, 0.0)  # Eq. 1: l_k
        new = update.apply(params["update"], m, aligned)
        return SlotMemory(new, memory.segments), (jnp.zeros(()), jnp.zeros(()))

    def read_slots(params: Params, memory: SlotMemory) -> tuple[Array, Array]:
        return memory.slots, jnp.ones(memory.slots.shape[:2], bool)

    def read(params: Params, memory: SlotMemory, query: Array, query_mask: Array, key: Key | None = None) -> Array:
        return multihop.multihop(params["reader"], query, *read_slots(params, memory))[0]

    return MemoryMachine(init, init_memory, encode, inert(write), read_slots, read, embed, True, None)


def slot_attention(params: Params, slots: Array, projected: Array, mask: Array, normalize: str = "slots") -> Array:
    """Eq. 1's weights [B, K, N] of params = the machine's 'attention', slots [B, K, d_m], W2 f + b [B, N, d_model] (the
    second part of the features that `encode` gives) and mask bool [B, N]. A machine with `slot_identity` adds its
    params['slots'] to the slots first."""
    scores = additive_scores(slots @ params["slot"], projected, params["score"])
    if normalize == "slots":
        return jnp.where(mask[:, None], jax.nn.softmax(scores, 1), 0.0)
    return masked_softmax(scores, mask[:, None], 2)
