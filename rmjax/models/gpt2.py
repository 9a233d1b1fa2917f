"""GPT-2 (Radford et al. 2019): the plain Transformer that Memoria and the infinity-former are built on.

Names of parameters are those of the released checkpoints, so that `rmjax.models.huggingface` only has to rename.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from flax.linen.initializers import normal

from rmjax.layers.attention import attend
from rmjax.layers.dense import Dense
from rmjax.layers.embeddings import look_up
from rmjax.layers.keys import dropout, fold
from rmjax.registry import above, at_least, below, setting
from rmjax.types import Array, Key, ModelContext, Params, SequenceModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a language model; hashable.

    Attributes:
      vocabulary: V.
      positions: the longest segment.
      dim, layers, heads: D, and how many; the feed-forward layer is 4 D wide.
      dropout: of embeddings, attention weights and what is added to the residual stream.
      dtype: of products; norms, softmax and logits are f32.
      initial: standard deviation of untrained kernels and tables; 0.02 is that of models several hundred wide.
      remat: the backward pass computes a layer again, of which its inputs alone are kept.
    """

    vocabulary: int
    positions: int = 1024
    dim: int = 768
    layers: int = 12
    heads: int = 12
    dropout: float = 0.1
    dtype: Any = jnp.float32
    initial: float = 0.02
    remat: bool = False

    def __post_init__(self):
        for name in ("vocabulary", "positions", "dim", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"width {self.dim} is not a multiple of heads {self.heads}")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of all sequence models."""

    dim: int = setting(512, at_least(1), "width")
    layers: int = setting(5, at_least(1), "layers")
    heads: int = setting(4, at_least(1), "attention heads; divides model.dim")
    dropout: float = setting(0.1, below(0, 1), "dropout rate")
    initial: float = setting(0.02, above(0), "standard deviation of untrained kernels and tables")
    remat: bool = setting(
        False, doc="computes a layer again in the backward pass rather than keep it"
    )

    def conflicts(self, config: Any = None) -> Iterator[str]:
        if self.dim % self.heads:
            yield "{heads} must divide {dim}"


def size_fields(settings: Settings, context: ModelContext) -> dict[str, Any]:
    """Fields of `Sizes`, with a position for each token of a segment."""
    of_settings = {
        field.name: getattr(settings, field.name) for field in dataclasses.fields(Settings)
    }
    return of_settings | dict(
        vocabulary=context.vocabulary,
        positions=context.segment_length,
        dtype=jnp.dtype(context.dtype),
    )


def build(settings: Settings, context: ModelContext) -> SequenceModel:
    """The model of a run's settings, which remembers nothing."""
    return make(Sizes(**size_fields(settings, context)))


def dense(sizes: Sizes, features: int, name: str | None, scale: float | None = None) -> Dense:
    """scale: standard deviation of the untrained kernel, None: the model's."""
    scale = sizes.initial if scale is None else scale
    return Dense(features, dtype=sizes.dtype, kernel_init=normal(scale), name=name)


def norm(sizes: Sizes, name: str | None) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, dtype=jnp.promote_types(sizes.dtype, jnp.float32), name=name)


def kept(sizes: Sizes, layer: type, methods: tuple[str, ...] = ("__call__",)) -> Any:
    """The layer's class, computed again in the backward pass where `sizes` say so."""
    return nn.remat(layer, methods=methods) if sizes.remat else layer


def split_heads(x: Array, heads: int) -> Array:
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)  # -1 could not be told of nothing


class SelfAttention(nn.Module):
    """Causal self-attention within a segment: x [B, N, D], mask bool [B, N] -> [B, N, D], its queries [B, N, H, e]."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: Array, mask: Array, key: Key | None) -> tuple[Array, Array]:
        s, n = self.sizes, x.shape[1]
        query, keys, value = (
            split_heads(y, s.heads) for y in jnp.split(dense(s, 3 * s.dim, "c_attn")(x), 3, -1)
        )
        seen = jnp.tril(jnp.ones((n, n), bool)) & mask[:, None, None, :]
        out, _ = attend(query, keys, value, seen, lambda w: dropout(w, s.dropout, fold(key, 0)))
        return out.reshape(x.shape), query


class Feedforward(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, x: Array) -> Array:
        s = self.sizes
        y = nn.gelu(dense(s, 4 * s.dim, "c_fc")(x), approximate=True)
        return dense(s, s.dim, "c_proj", residual_scale(s))(y)


def residual_scale(sizes: Sizes) -> float:
    """Standard deviation of kernels that end in the residual stream."""
    return sizes.initial / (2 * sizes.layers) ** 0.5


class Block(nn.Module):
    """x [B, N, D], mask bool [B, N], what the layer is to remember (here nothing) -> x, what it tells (nothing)."""

    sizes: Sizes

    @nn.compact
    def __call__(
        self, x: Array, mask: Array, remembered: Any, key: Key | None
    ) -> tuple[Array, Any]:
        s = self.sizes
        attended, _ = SelfAttention(s, name="attn")(norm(s, "ln_1")(x), mask, fold(key, 0))
        x = x + dropout(
            dense(s, s.dim, "attn_c_proj", residual_scale(s))(attended), s.dropout, fold(key, 1)
        )
        return x + dropout(
            Feedforward(s, name="mlp")(norm(s, "ln_2")(x)), s.dropout, fold(key, 2)
        ), ()


class GPT2(nn.Module):
    """tokens i32 [B, N], mask bool [B, N], what each layer is to remember -> hidden f32 [B, N, D], what each tells."""

    sizes: Sizes
    block: type[nn.Module] = Block
    options: Any = ()  # of the block, beside its sizes

    @nn.compact
    def __call__(
        self, tokens: Array, mask: Array, remembered: tuple | None = None, key: Key | None = None
    ) -> tuple[Array, tuple]:
        s, told = self.sizes, []
        check_length(s, tokens)
        words = self.param("wte", normal(s.initial), (s.vocabulary, s.dim))
        places = self.param("wpe", normal(s.initial), (s.positions, s.dim))
        x = (look_up(words, tokens) + places[: tokens.shape[1]]).astype(s.dtype)
        x = dropout(x, s.dropout, fold(key, s.layers))
        for i in range(s.layers):
            block = kept(s, self.block)(s, *self.options, name=f"h_{i}")
            x, tells = block(x, mask, None if remembered is None else remembered[i], fold(key, i))
            told.append(tells)
        return norm(s, "ln_f")(x), tuple(told)


def check_length(sizes: Sizes, tokens: Array) -> None:
    if tokens.shape[1] > sizes.positions:
        raise ValueError(
            f"a segment of {tokens.shape[1]} tokens is longer than the model's positions {sizes.positions}"
        )


def tied_logits(sizes: Sizes) -> Callable[[Params, Array, Key | None], Array]:
    """-> (params, hidden [..., D], key) -> f32 [..., V], by the table of the words themselves; nothing is drawn."""

    def logits(params: Params, hidden: Array, key: Key | None = None) -> Array:
        both = hidden.astype(sizes.dtype), params["wte"].astype(sizes.dtype)
        return jnp.einsum("...d,vd->...v", *both, preferred_element_type=jnp.float32)

    return logits


@flax.struct.dataclass
class Nothing:
    segments: Array  # i32 [B] read so far


def make(sizes: Sizes) -> SequenceModel:
    """The plain Transformer: each segment on its own."""
    module = GPT2(sizes)

    def init(key: Key) -> Params:
        tokens = jnp.zeros((1, 1), jnp.int32)
        return module.init(key, tokens, tokens == 0)["params"]

    def init_state(params: Params, batch_size: int) -> Nothing:
        return Nothing(jnp.zeros(batch_size, jnp.int32))

    def reset(state: Nothing, where: Array) -> Nothing:
        return Nothing(jnp.where(where, 0, state.segments))

    def step(params: Params, state: Nothing, tokens: Array, mask: Array, key: Key | None = None):
        hidden, _ = module.apply({"params": params}, tokens, mask, None, key)
        return hidden, Nothing(state.segments + mask.any(-1)), (jnp.zeros(()), jnp.zeros(()))

    return SequenceModel(init, init_state, reset, step, tied_logits(sizes))
