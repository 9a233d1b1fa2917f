"""The Memoria Transformer (Memoria section 4.1, Figure 7).

It is GPT-2, with blocks that also attend to working and reminded engrams.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.linen.initializers import normal

from rmjax import memoria
from rmjax.layers.attention import attend, masked_softmax, split_heads
from rmjax.layers.dense import Dense
from rmjax.layers.keys import dropout, fold
from rmjax.models import gpt2
from rmjax.models.gpt2 import (
    GPT2,
    Feedforward,
    SelfAttention,
    Sizes,
    dense,
    no_loss,
    norm,
    residual_scale,
    tied_logits,
)
from rmjax.types import Array, Key, ModelContext, Params, SequenceModel, Sum

if TYPE_CHECKING:
    from ml_collections import ConfigDict


class Engrams(NamedTuple):
    """The settings in config.memoria: rules of the memory, and how a model makes engrams.

    Attributes:
      rules: of the memory.
      layer: index of the layer whose output makes the engrams; -1: the model's own choice.
      activation: see `Abstractor`.
    """

    rules: memoria.MemoriaConfig
    layer: int = -1
    activation: str = "relu"


class Abstractor(nn.Module):
    """Makes working engrams of hidden states: f_e(h) = FFN(softmax(Q W_k h) W_v h).

    Takes hidden [B, N, D] and mask bool [B, N]. Returns working engrams [B, N_wm, D].

    Attributes:
      engrams: N_wm.
      activation: of the FFN, 'relu' as in the Transformer that the paper refers to, or 'none' as in
        the released code.
      dtype: of products.
      initial: standard deviation of untrained kernels.
    """

    engrams: int
    activation: str = "relu"
    dtype: jnp.dtype = jnp.float32
    initial: float = 0.02

    @nn.compact
    def __call__(self, hidden: Array, mask: Array) -> Array:
        """Applies the module, see the class."""
        dim, init = hidden.shape[-1], normal(self.initial)
        query = self.param("query", init, (self.engrams, dim)).astype(self.dtype)
        layer = lambda features, name: Dense(
            features, dtype=self.dtype, kernel_init=init, name=name
        )
        keys = layer(dim, "key")(hidden)
        scores = jnp.einsum("kd,bnd->bkn", query, keys, preferred_element_type=jnp.float32)
        weights = masked_softmax(scores, mask[:, None]).astype(self.dtype)
        wide = layer(4 * dim, "wide")(weights @ layer(dim, "value")(hidden))
        return layer(dim, "narrow")(nn.relu(wide) if self.activation == "relu" else wide)


@flax.struct.dataclass
class Recalled:
    """The engrams that all blocks attend to in a segment."""

    working: Array  # [B, N_wm, D]
    reminded: Array  # [B, k, D]
    valid: Array  # bool [B, k]
    started: Array  # bool [B] whether the stream has an earlier segment


class MemoryAttention(nn.Module):
    """The cross-attention to engrams, used for working and for reminded engrams.

    Takes x [B, N, D], engrams [B, k, D] and mask bool [B, k]. Returns [B, N, D], which is zero
    where the mask is all false, and weights [B, H, N, k].
    """

    sizes: Sizes

    @nn.compact
    def __call__(
        self, x: Array, engrams: Array, mask: Array, key: Key | None
    ) -> tuple[Array, Array]:
        """Applies the module, see the class."""
        s = self.sizes
        query = split_heads(dense(s, s.dim, "q_attn")(x), s.heads)
        both = jnp.split(dense(s, 2 * s.dim, "c_attn")(engrams), 2, -1)
        keys, value = (split_heads(y, s.heads) for y in both)
        drop = lambda w: dropout(w, s.dropout, fold(key, 0))
        out, weights = attend(query, keys, value, mask[:, None, None], drop)
        out = dense(s, s.dim, "c_proj", residual_scale(s))(out.reshape(x.shape))
        out = dropout(out, s.dropout, fold(key, 1))
        return jnp.where(mask.any(-1)[:, None, None], out, 0.0), weights


class Block(nn.Module):
    """GPT-2's block, with the cross-attention to engrams before the feed-forward layer.

    Takes x [B, N, D], mask bool [B, N] and `Recalled`. Returns x and the report: the attention that
    each reminded engram got from all heads and queries, f32 [B, k], and x again.
    """

    sizes: Sizes

    def setup(self):
        """Creates the submodules."""
        s = self.sizes
        self.attn, self.memory_attn, self.mlp = SelfAttention(s), MemoryAttention(s), Feedforward(s)
        self.ln_1, self.ln_2 = norm(s, None), norm(s, None)
        self.ln_working_memory_attn, self.ln_memory_attn = norm(s, None), norm(s, None)
        self.attn_c_proj = dense(s, s.dim, None, residual_scale(s))

    def __call__(
        self, x: Array, mask: Array, recalled: Recalled, key: Key | None
    ) -> tuple[Array, tuple[Array, Array]]:
        """Applies the module, see the class."""
        rate = self.sizes.dropout
        attended = self.attn_c_proj(self.attn(self.ln_1(x), mask, fold(key, 0))[0])
        x = x + dropout(attended, rate, fold(key, 1))
        started = jnp.broadcast_to(recalled.started[:, None], recalled.working.shape[:2])
        normed = self.ln_working_memory_attn(x)
        seen, _ = self.memory_attn(normed, recalled.working, started, fold(key, 2))
        x = x + seen
        normed = self.ln_memory_attn(x)
        seen, weights = self.memory_attn(normed, recalled.reminded, recalled.valid, fold(key, 3))
        x = x + seen
        x = x + dropout(self.mlp(self.ln_2(x)), rate, fold(key, 4))
        return x, (jax.vmap(memoria.contribution)(weights, mask), x)


@flax.struct.dataclass
class Remembered:
    """The state."""

    hidden: Array  # [B, N, D] of the last segment
    mask: Array  # bool [B, N]
    engrams: memoria.State  # leading axis B
    segments: Array  # i32 [B] read so far
    record: memoria.Record  # [B, C] engrams present and reminded in the last segment


def check_config(config: memoria.MemoriaConfig, sizes: gpt2.Sizes) -> None:
    """Checks that the rules of the memory fit a model.

    Raises:
      ValueError: the widths differ, or ties are random.
    """
    if config.dim != sizes.dim:
        raise ValueError(
            f"engrams of width {config.dim} do not fit into a model of width {sizes.dim}: "
            "set both to the same width"
        )
    if config.ties == "random":
        raise ValueError(
            "ties='random' needs a key, which dropout has and evaluation does not: "
            "take 'hash', 'oldest' or 'newest'"
        )


def latest(old: memoria.Record, new: memoria.Record, where: Array) -> memoria.Record:
    """The new record of the streams `where` bool [B] is true, the old record of the others."""
    return jax.tree.map(lambda old, new: jnp.where(where[:, None], new, old), old, new)


def make(
    sizes: Sizes,
    config: memoria.MemoriaConfig,
    *,
    segment_length: int,
    memory_layer: int | None = None,
    activation: str = "relu",
) -> SequenceModel:
    """Builds a Memoria Transformer.

    Engrams are stored without gradients. The abstractor learns from the use of the working engrams
    in the segment that makes them.

    Args:
      sizes: of the model.
      config: rules of the memory; `dim` must be the model's width.
      segment_length: N.
      memory_layer: index of the layer whose output for the last segment the abstractor reads; None:
        the output of the final norm, as in the paper.
      activation: see `Abstractor`.

    Returns:
      The model.

    Raises:
      ValueError: the widths differ, the layer does not exist, the positions do not suffice for a
        segment, or ties are random.
    """
    check_config(config, sizes)
    if memory_layer is not None and not 0 <= memory_layer < sizes.layers:
        raise ValueError(
            f"memory_layer must be one of 0 .. {sizes.layers - 1} or None, got {memory_layer}"
        )
    if segment_length > sizes.positions:
        raise ValueError(
            f"segment_length={segment_length} is more than the model's positions {sizes.positions}"
        )
    abstractor = Abstractor(config.working, activation, sizes.dtype, sizes.initial)
    model = _Model(sizes, config, segment_length, memory_layer, GPT2(sizes, Block), abstractor)
    return SequenceModel(model.init, model.init_state, model.reset, model.step, tied_logits(sizes))


@dataclasses.dataclass(frozen=True, eq=False)
class _Model:
    """The functions of `make`; they share its arguments."""

    sizes: Sizes
    config: memoria.MemoriaConfig
    segment_length: int
    memory_layer: int | None
    module: GPT2
    abstractor: Abstractor

    def init(self, key: Key) -> Params:
        dim, working = self.sizes.dim, self.config.working
        recalls = self.config.remind_short_term + self.config.remind_long_term
        model, abstract = jax.random.split(key)
        tokens, hidden = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, dim))
        none = jnp.zeros((1, recalls), bool), jnp.zeros(1, bool)
        nothing = Recalled(jnp.zeros((1, working, dim)), jnp.zeros((1, recalls, dim)), *none)
        layers = (nothing,) * self.sizes.layers
        params = self.module.init(model, tokens, tokens == 0, layers)["params"]
        abstractor = self.abstractor.init(abstract, hidden, tokens == 0)["params"]
        return params | {"abstractor": abstractor}

    def init_state(self, params: Params, batch_size: int) -> Remembered:
        engrams, shape = memoria.fork(memoria.init(self.config), batch_size), self.segment_length
        return Remembered(
            jnp.zeros((batch_size, shape, self.sizes.dim), self.sizes.dtype),
            jnp.zeros((batch_size, shape), bool),
            engrams,
            jnp.zeros(batch_size, jnp.int32),
            memoria.empty_record(engrams),
        )

    def reset(self, state: Remembered, where: Array) -> Remembered:
        engrams = memoria.reset(state.engrams, where)
        return dataclasses.replace(
            state,
            mask=state.mask & ~where[:, None],
            engrams=engrams,
            segments=jnp.where(where, 0, state.segments),
            record=latest(state.record, memoria.empty_record(engrams), where),
        )

    def step(
        self, params: Params, state: Remembered, tokens: Array, mask: Array, key: Key | None = None
    ) -> tuple[Array, Remembered, Sum]:
        sizes, started, alive = self.sizes, state.mask.any(-1), mask.any(-1)
        counts = started & alive
        abstract = {"params": params["abstractor"]}
        working = cast(Array, self.abstractor.apply(abstract, state.hidden, state.mask))
        remind = jax.vmap(functools.partial(memoria.remind, self.config))
        engrams, reminded = remind(state.engrams, working, fold(key, sizes.layers + 1), counts)
        record = latest(state.record, jax.vmap(memoria.record)(engrams, reminded), counts)
        recalled = Recalled(working, reminded.engrams.astype(sizes.dtype), reminded.valid, started)
        layers = (recalled,) * sizes.layers
        applied = self.module.apply({"params": params}, tokens, mask, layers, key)
        hidden, reports = cast(tuple, applied)
        weights = sum(looked for looked, _ in reports) / sizes.layers
        finish = jax.vmap(functools.partial(memoria.memorize_and_forget, self.config))
        engrams = finish(engrams, reminded, weights, counts)
        source = hidden if self.memory_layer is None else reports[self.memory_layer][1]
        missing = [(0, 0), (0, self.segment_length - tokens.shape[1])]
        padded = jnp.pad(source, [*missing, (0, 0)]).astype(sizes.dtype)
        after = Remembered(
            jnp.where(alive[:, None, None], padded, state.hidden),
            jnp.where(alive[:, None], jnp.pad(mask, missing), state.mask),
            engrams,
            state.segments + alive,
            record,
        )
        return hidden, after, no_loss()


@dataclasses.dataclass(frozen=True)
class Settings(gpt2.Settings):
    """Settings of the model; the rules of the memory are in config.memoria."""

    def conflicts(self, config: ConfigDict | None = None) -> Iterator[str]:
        """Yields a message for each conflict, see `rmjax.registry.Registry.settings`."""
        yield from super().conflicts(config)
        if config is not None and config.memoria.layer >= self.layers:
            last = self.layers - 1
            layer = config.memoria.layer
            yield f"config.memoria.layer = {layer}: must be at most {last}, for {{layers}}"


def build(settings: Settings, context: ModelContext) -> SequenceModel:
    """Builds the model, see `rmjax.types.SequenceModel`."""
    engrams = context.engrams
    return make(
        Sizes(**gpt2.size_fields(settings, context)),
        dataclasses.replace(engrams.rules, dim=settings.dim, max_segments=context.max_segments),
        segment_length=context.segment_length,
        memory_layer=None if engrams.layer < 0 else engrams.layer,
        activation=engrams.activation,
    )
