"""The self-attentive associative memory, STM (Le et al. 2020): items and their relations.

The item memory M_i is a matrix, a sum of outer products of single items. Self-attention over its
rows gives R_0, a tensor of relations between items; the relational memory M_r adds them up.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal, normal, xavier_uniform

from rmjax.layers import norms
from rmjax.layers.embeddings import embed, init_items
from rmjax.machines.scan import scan_items
from rmjax.reason import hops
from rmjax.registry import at_least, between, one_of, setting
from rmjax.types import Array, Context, Key, MemoryMachine, Params, Sum


@flax.struct.dataclass
class STMMemory:
    """The memory of B streams; n is the number of queries."""

    items: Array  # f32 [B, d, d], M_i
    relations: Array  # f32 [B, n, d, d], M_r
    segments: Array  # i32 [B] segments written so far


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the STM machine."""

    dim: int = setting(64, at_least(1), "item width, d")
    slots: int = setting(20, at_least(1), "memory slots, K")
    queries: int = setting(8, at_least(1), "stm: queries of the self-attention, n")
    retention: float = setting(
        0.0, between(0, 1), "stm: untrained alpha_1, the share of relations that an item keeps"
    )
    pool: bool = setting(False, doc="stm: writes the mean of a segment's items, not single items")
    reader: str = setting(
        "attention", one_of("attention", "own"), "reads the slots in hops, or as in the paper"
    )

    @property
    def ignores(self) -> dict[str, str]:
        """Keys that such a run does not read, see `rmjax.registry.Registry.ignored_by`."""
        return {"reason.hops": "reader"} if self.reader == "own" else {}


class Features(NamedTuple):
    """What `write` reads of items [...]; it does not depend on the memory."""

    item: Array  # f32 [..., d], a
    key: Array  # f32 [..., d], b
    share: Array  # f32 [..., n], c, which sums to 1
    gates: Array  # f32 [..., 2d], W_i a and the bias


def _normalize(p: Params, x: Array, axis: int | tuple[int, ...] = -1) -> Array:
    """The layer norm of x over some axes, with the scale and bias of p."""
    norm = nn.LayerNorm(reduction_axes=axis, feature_axes=axis, use_fast_variance=False)
    return jnp.asarray(norm.apply({"params": p}, x))


def make(num_items: int, settings: Settings, context: Context) -> MemoryMachine:
    """Builds the machine, see `rmjax.types.MemoryMachine`.

    STM has no K slots. Here a learned map [K, n d] of the rows of M_r makes them. Each slot is
    normalised, since M_r may be a sum over all items.
    """
    dim, queries, own = settings.dim, settings.queries, settings.reader == "own"

    def init(key: Key) -> Params:
        a, b, c, d = jax.random.split(key, 4)
        reader = init_reader(c, dim, queries) if own else hops.init(c, dim, dim, context)
        return init_items(a, num_items, dim, context.width) | {
            "cell": init_cell(b, dim, queries, settings.retention),
            "slots": normal((queries * dim) ** -0.5)(d, (settings.slots, queries * dim)),
            "reader": reader,
        }

    def init_memory(params: Params, batch_size: int) -> STMMemory:
        first = params["cell"]["items"], params["cell"]["relations"]
        items, relations = (jnp.broadcast_to(x, (batch_size, *x.shape)) for x in first)
        return STMMemory(items, relations, jnp.zeros(batch_size, jnp.int32))

    def encode(params: Params, items: Array, mask: Array, key: Key | None = None) -> Features:
        x, cell = embed(params, items), params["cell"]
        if settings.pool:
            total = jnp.where(mask[..., None], x, 0.0).sum(-2, keepdims=True)
            x = total / jnp.maximum(mask.sum(-1), 1)[..., None, None]
        a, b, c = (x @ cell[name] + cell[name + "_bias"] for name in ("item", "key", "share"))
        return Features(a, b, jax.nn.softmax(c), a @ cell["item_gates"] + cell["gates_bias"])

    def write(
        params: Params, memory: STMMemory, features: Features, mask: Array, key: Key | None = None
    ) -> tuple[STMMemory, Sum]:
        mask = mask.any(1, keepdims=True) if settings.pool else mask
        state = memory.items, memory.relations
        items, relations = write_items(params["cell"], state, features, mask)
        aux = jnp.zeros(()), jnp.zeros(())
        return STMMemory(items, relations, memory.segments), aux

    def slots(params: Params, memory: STMMemory) -> tuple[Array, Array]:
        rows = memory.relations.reshape(-1, queries * dim, dim)
        made = norms.layer(params["slots"] @ rows)
        return made, jnp.ones(made.shape[:2], bool)

    def read(
        params: Params, memory: STMMemory, query: Array, query_mask: Array, key: Key | None = None
    ) -> Array:
        return own_read(params["reader"], query, memory.relations)

    functions = init, init_memory, encode, write, slots, read if own else hops.reader(slots), embed
    table = ("embed",) if num_items else None
    return MemoryMachine(*functions, constant_size=True, gradient_range=None, table=table)


def init_cell(key: Key, dim: int, queries: int, retention: float) -> Params:
    """Draws the parameters of `step`, and the memories of an empty stream.

    Args:
      key: of the draws.
      dim: d.
      queries: n.
      retention: alpha_1; alpha_2 and alpha_3 begin at zero.

    Returns:
      A dictionary of arrays.
    """
    keys, dense = jax.random.split(key, 9), lecun_normal()
    return {
        "item": dense(keys[0], (dim, dim)),  # f_1
        "item_bias": jnp.zeros(dim),
        "key": dense(keys[1], (dim, dim)),  # f_2
        "key_bias": jnp.zeros(dim),
        "share": dense(keys[2], (dim, queries)),  # f_3
        "share_bias": jnp.zeros(queries),
        "item_gates": dense(keys[3], (dim, 2 * dim)),  # W_i
        "memory_gates": dense(keys[4], (dim, 2 * dim)),  # W_m
        "gates_bias": jnp.zeros(2 * dim),
        "qkv": dense(keys[5], (dim, 3 * queries)),
        "qkv_bias": jnp.zeros(3 * queries),
        "norm": {"scale": jnp.ones((dim, 3 * queries)), "bias": jnp.zeros((dim, 3 * queries))},
        "transfer": dense(keys[6], (queries * dim, dim)),  # G_2
        "transfer_bias": jnp.zeros(dim),
        "alpha": jnp.array([retention, 0.0, 0.0]),
        "items": normal((6 * dim) ** -0.5)(keys[7], (dim, dim)),
        "relations": normal((6 * dim + 3 * queries) ** -0.5)(keys[8], (queries, dim, dim)),
    }


_State = tuple[Array, Array]  # M_i f32 [B, d, d], M_r f32 [B, n, d, d]


# One state of a stream has (n + 1) d^2 numbers. The backward pass keeps one for each segment, and
# computes those after the items once more.
@jax.checkpoint
def write_items(params: Params, state: _State, features: Features, mask: Array) -> _State:
    """Writes items one by one; masked items change nothing.

    Args:
      params: of `init_cell`.
      state: M_i and M_r.
      features: of [B, N] items.
      mask: bool [B, N].

    Returns:
      M_i and M_r.
    """
    return scan_items(functools.partial(step, params), state, features, mask)


def step(params: Params, state: _State, x: Features) -> _State:
    """Writes one item (Le et al. 2020, section 3).

    The learned alpha_1 is kept within [-1, 1]: M_r stays finite in streams of any length. Its
    gradient passes the clip, so a step of training beyond the edge can be taken back.

    Args:
      params: of `init_cell`.
      state: M_i and M_r.
      x: features of [B] items.

    Returns:
      M_i and M_r.
    """
    items, relations = state
    alpha, queries = params["alpha"], x.share.shape[-1]
    gates = x.gates[:, None] + jnp.tanh(items) @ params["memory_gates"]
    take, keep = jnp.split(gates, 2, -1)
    outer = jnp.tanh(x.item[:, :, None] * x.item[:, None])
    items = jax.nn.sigmoid(take) * outer + jax.nn.sigmoid(keep + 1.0) * items
    # What the relations say about the item: r = sum_n c_n b^T M_r[n], and X_2 = r b^T.
    keys = x.share[:, :, None] * x.key[:, None]
    recalled = jnp.einsum("bnx,bnxy->by", keys, relations)
    asked = items + alpha[1] * recalled[:, :, None] * x.key[:, None]
    z = asked @ params["qkv"] + params["qkv_bias"]
    z = _normalize(params["norm"], z, (1, 2)).swapaxes(1, 2)
    q, k, v = jnp.split(z, 3, 1)  # [B, n, d]
    # R_0[i] = sum_j tanh(q_i * k_j) v_j^T. G_2 leaves its last axis, that of v, as it is. So G_2
    # can act on the tanh first, which takes n / d of the products.
    pairs = jnp.tanh(q[:, :, None] * k[:, None])
    transfer = params["transfer"].reshape(queries, -1, items.shape[-1])
    moved = jnp.einsum("bjy,bjo->byo", v, jnp.einsum("bijx,ixo->bjo", pairs, transfer))
    items = items + alpha[2] * (moved + params["transfer_bias"])
    related = jnp.einsum("bijx,bjy->bixy", pairs, v)
    return items, clipped(alpha[0]) * relations + related


def clipped(x: Array) -> Array:
    """Clips x to [-1, 1] with the gradient of the identity, so that a clipped x still learns."""
    return jax.lax.stop_gradient(jnp.clip(x, -1.0, 1.0)) + (x - jax.lax.stop_gradient(x))


def init_reader(key: Key, dim: int, queries: int) -> Params:
    """Draws the parameters of `own_read`: networks for an entity and three roles, and the norms."""

    def network(key: Key, width: int) -> Params:
        a, b = jax.random.split(key)
        return {
            "hidden": xavier_uniform()(a, (dim, dim)),
            "hidden_bias": jnp.zeros(dim),
            "out": xavier_uniform()(b, (dim, width)),
            "out_bias": jnp.zeros(width),
        }

    first, *keys = jax.random.split(key, 4)
    return {
        "entity": network(first, dim),
        "roles": [network(k, queries) for k in keys],
        "norms": [{"scale": jnp.ones(dim), "bias": jnp.zeros(dim)} for _ in keys],
    }


def own_read(params: Params, query: Array, relations: Array) -> Array:
    """The reader of the paper for bAbI, after Schlag & Schmidhuber 2018: three steps of inference.

    Step s computes i_s = norm(sum_n r_s[n] i_(s-1)^T M_r[n]). The entity i_0 and the roles r_s are
    functions of the question. The answer is i_1 + i_2 + i_3.

    Args:
      params: of `init_reader`.
      query: f32 [B, Q, d].
      relations: f32 [B, n, d, d].

    Returns:
      f32 [B, Q, d].
    """

    def network(p: Params) -> Array:
        hidden = jnp.tanh(query @ p["hidden"] + p["hidden_bias"])
        return jnp.tanh(hidden @ p["out"] + p["out_bias"])

    entity, answer = network(params["entity"]), jnp.zeros_like(query)
    for p, norm in zip(params["roles"], params["norms"], strict=True):
        both = network(p)[..., None] * entity[..., None, :]
        inferred = jnp.einsum("bqnx,bnxy->bqy", both, relations)
        entity = _normalize(norm, inferred)
        answer = answer + entity
    return answer
