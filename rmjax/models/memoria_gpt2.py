"""The Memoria Transformer (Memoria section 4.1, Figure 7): GPT-2 whose blocks look at working and reminded engrams."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.linen.initializers import normal

from rmjax import memoria
from rmjax.layers.attention import attend, masked_softmax
from rmjax.layers.dense import Dense
from rmjax.layers.keys import dropout, fold
from rmjax.models import gpt2
from rmjax.models.gpt2 import (
    GPT2,
    Feedforward,
    SelfAttention,
    Sizes,
    dense,
    norm,
    residual_scale,
    split_heads,
    tied_logits,
)
from rmjax.types import Array, Key, ModelContext, Params, SequenceModel


class Engrams(NamedTuple):
    """What config.memoria says: the rules of the memory, and how a model makes engrams."""

    rules: memoria.MemoriaConfig
    layer: int = -1  # whose output they are made of; -1: the model's own choice
    activation: str = "relu"


class Abstractor(nn.Module):
    """f_e: hidden [B, N, D], mask bool [B, N] -> working engrams [B, N_wm, D] = FFN(softmax(Q W_k h) W_v h).

    activation: of the FFN, 'relu' as in the Transformer that the paper refers to, or 'none' as released.
    """

    engrams: int
    activation: str = "relu"
    dtype: jnp.dtype = jnp.float32
    initial: float = 0.02

    @nn.compact
    def __call__(self, hidden: Array, mask: Array) -> Array:
        dim = hidden.shape[-1]
        query = self.param("query", normal(self.initial), (self.engrams, dim)).astype(self.dtype)
        layer = lambda features, name: Dense(
            features, dtype=self.dtype, kernel_init=normal(self.initial), name=name
        )
        scores = jnp.einsum(
            "kd,bnd->bkn", query, layer(dim, "key")(hidden), preferred_element_type=jnp.float32
        )
        weights = masked_softmax(scores, mask[:, None]).astype(self.dtype)
        wide = layer(4 * dim, "wide")(weights @ layer(dim, "value")(hidden))
        return layer(dim, "narrow")(nn.relu(wide) if self.activation == "relu" else wide)


@flax.struct.dataclass
class Recalled:
    """What all blocks look at in a segment."""

    working: Array  # [B, N_wm, D]
    reminded: Array  # [B, k, D]
    valid: Array  # bool [B, k]
    there: Array  # bool [B] whether there was a segment before


class MemoryAttention(nn.Module):
    """One cross-attention, for working and for reminded engrams: x [B, N, D], engrams [B, k, D], mask bool [B, k]
    -> [B, N, D], weights [B, H, N, k]. Nothing to look at adds nothing.
    """

    sizes: Sizes

    @nn.compact
    def __call__(
        self, x: Array, engrams: Array, mask: Array, key: Key | None
    ) -> tuple[Array, Array]:
        s = self.sizes
        query = split_heads(dense(s, s.dim, "q_attn")(x), s.heads)
        keys, value = (
            split_heads(y, s.heads)
            for y in jnp.split(dense(s, 2 * s.dim, "c_attn")(engrams), 2, -1)
        )
        out, weights = attend(
            query, keys, value, mask[:, None, None], lambda w: dropout(w, s.dropout, fold(key, 0))
        )
        out = dense(s, s.dim, "c_proj", residual_scale(s))(out.reshape(x.shape))
        return jnp.where(
            mask.any(-1)[:, None, None], dropout(out, s.dropout, fold(key, 1)), 0.0
        ), weights


class Block(nn.Module):
    """GPT-2's, with the memory's cross-attention between self-attention and feed-forward; tells how much its heads and
    queries looked at each reminded engram, f32 [B, k], and its output.
    """

    sizes: Sizes

    def setup(self):
        s = self.sizes
        self.attn, self.memory_attn, self.mlp = SelfAttention(s), MemoryAttention(s), Feedforward(s)
        self.ln_1, self.ln_2 = norm(s, None), norm(s, None)
        self.ln_working_memory_attn, self.ln_memory_attn = norm(s, None), norm(s, None)
        self.attn_c_proj = dense(s, s.dim, None, residual_scale(s))

    def __call__(
        self, x: Array, mask: Array, recalled: Recalled, key: Key | None
    ) -> tuple[Array, Any]:
        rate = self.sizes.dropout
        x = x + dropout(
            self.attn_c_proj(self.attn(self.ln_1(x), mask, fold(key, 0))[0]), rate, fold(key, 1)
        )
        there = jnp.broadcast_to(recalled.there[:, None], recalled.working.shape[:2])
        seen, _ = self.memory_attn(
            self.ln_working_memory_attn(x), recalled.working, there, fold(key, 2)
        )
        x = x + seen
        seen, weights = self.memory_attn(
            self.ln_memory_attn(x), recalled.reminded, recalled.valid, fold(key, 3)
        )
        x = x + seen
        x = x + dropout(self.mlp(self.ln_2(x)), rate, fold(key, 4))
        return x, (jax.vmap(memoria.contribution)(weights, mask), x)


@flax.struct.dataclass
class Remembered:
    hidden: Array  # [B, N, D] of the last segment
    mask: Array  # bool [B, N]
    engrams: memoria.State  # leading axis B
    segments: Array  # i32 [B] read so far
    record: memoria.Record  # [B, C] of who was there, and reminded, in the last segment


def check_ties(config: memoria.MemoriaConfig) -> None:
    if config.ties == "random":
        raise ValueError(
            "ties='random' needs a key, which dropout has and evaluation has not: take 'hash', 'oldest' or 'newest'"
        )


def latest(old: memoria.Record, new: memoria.Record, where: Array) -> memoria.Record:
    """The new record of streams `where` [B] it counts, the old one of others."""
    return jax.tree.map(lambda old, new: jnp.where(where[:, None], new, old), old, new)


def make(
    sizes: Sizes,
    config: memoria.MemoriaConfig,
    *,
    segment_length: int,
    memory_layer: int | None = None,
    activation: str = "relu",
) -> SequenceModel:
    """config: of the engrams; its `dim` must be the model's. memory_layer: whose output for the last segment the
    abstractor sees, None: the final norm's, as the paper has it. activation: see `Abstractor`.

    Engrams are stored without gradients; the abstractor learns from how the working engrams are used at once.
    """
    if config.dim != sizes.dim:
        raise ValueError(
            f"engrams of width {config.dim} do not go into a model of width {sizes.dim}: set one to the other"
        )
    if memory_layer is not None and not 0 <= memory_layer < sizes.layers:
        raise ValueError(
            f"memory_layer must be one of 0 .. {sizes.layers - 1} or None, got {memory_layer}"
        )
    if segment_length > sizes.positions:
        raise ValueError(
            f"segment_length={segment_length} is more than the model's positions {sizes.positions}"
        )
    check_ties(config)
    module, abstractor = (
        GPT2(sizes, Block),
        Abstractor(config.working, activation, sizes.dtype, sizes.initial),
    )
    recalls = config.remind_short_term + config.remind_long_term

    def init(key: Key) -> Params:
        model, abstract = jax.random.split(key)
        tokens, hidden = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, sizes.dim))
        nothing = Recalled(jnp.zeros((1, config.working, sizes.dim)), jnp.zeros((1, recalls, sizes.dim)),
                           jnp.zeros((1, recalls), bool), jnp.zeros(1, bool))  # fmt: skip
        params = module.init(model, tokens, tokens == 0, (nothing,) * sizes.layers)["params"]
        return params | {"abstractor": abstractor.init(abstract, hidden, tokens == 0)["params"]}

    def init_state(params: Params, batch_size: int) -> Remembered:
        engrams = memoria.fork(memoria.init(config), batch_size)
        return Remembered(
            jnp.zeros((batch_size, segment_length, sizes.dim), sizes.dtype),
            jnp.zeros((batch_size, segment_length), bool),
            engrams,
            jnp.zeros(batch_size, jnp.int32),
            memoria.empty_record(engrams),
        )

    def reset(state: Remembered, where: Array) -> Remembered:
        engrams = memoria.reset(state.engrams, where)
        return state.replace(  # type: ignore[attr-defined]
            mask=state.mask & ~where[:, None],
            engrams=engrams,
            segments=jnp.where(where, 0, state.segments),
            record=latest(state.record, memoria.empty_record(engrams), where),
        )

    def step(params: Params, state: Remembered, tokens: Array, mask: Array, key: Key | None = None):
        there, alive = state.mask.any(-1), mask.any(-1)
        working = cast(
            Array, abstractor.apply({"params": params["abstractor"]}, state.hidden, state.mask)
        )
        remind = functools.partial(memoria.remind, config)
        engrams, reminded = jax.vmap(remind)(
            state.engrams, working, fold(key, sizes.layers + 1), there & alive
        )
        told_of = latest(state.record, jax.vmap(memoria.record)(engrams, reminded), there & alive)
        recalled = Recalled(working, reminded.engrams.astype(sizes.dtype), reminded.valid, there)
        layers = (recalled,) * sizes.layers
        hidden, told = cast(tuple, module.apply({"params": params}, tokens, mask, layers, key))
        weights = sum(looked for looked, _ in told) / sizes.layers
        finish = functools.partial(memoria.memorize_and_forget, config)
        engrams = jax.vmap(finish)(engrams, reminded, weights, there & alive)
        kept = hidden if memory_layer is None else told[memory_layer][1]
        missing = [(0, 0), (0, segment_length - tokens.shape[1])]
        after = Remembered(
            jnp.where(
                alive[:, None, None],
                jnp.pad(kept, [*missing, (0, 0)]).astype(sizes.dtype),
                state.hidden,
            ),
            jnp.where(alive[:, None], jnp.pad(mask, missing), state.mask),
            engrams,
            state.segments + alive,
            told_of,
        )
        return hidden, after, (jnp.zeros(()), jnp.zeros(()))

    return SequenceModel(init, init_state, reset, step, tied_logits(sizes))


@dataclasses.dataclass(frozen=True)
class Settings(gpt2.Settings):
    """The rules of its memory are a section of their own, config.memoria."""

    def conflicts(self, config: Any = None) -> Iterator[str]:
        yield from super().conflicts(config)
        if config is not None and config.memoria.layer >= self.layers:
            yield f"config.memoria.layer = {config.memoria.layer}: must be at most {self.layers - 1}, for {{layers}}"


def build(settings: Settings, context: ModelContext) -> SequenceModel:
    """The model of a run's settings."""
    engrams = context.engrams
    rules = dataclasses.replace(engrams.rules, dim=settings.dim, max_segments=context.max_segments)
    layer = None if engrams.layer < 0 else engrams.layer
    sizes = Sizes(**gpt2.size_fields(settings, context))
    options = dict(
        segment_length=context.segment_length, memory_layer=layer, activation=engrams.activation
    )
    return make(sizes, rules, **options)
