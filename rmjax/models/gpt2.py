"""GPT-2 (Radford et al. 2019): the plain Transformer under Memoria and the infinity-former.

Parameters have the names of the released checkpoints, so `rmjax.models.huggingface` only renames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from flax.linen.initializers import normal

from rmjax.layers.attention import attend, split_heads
from rmjax.layers.dense import Dense
from rmjax.layers.embeddings import look_up
from rmjax.layers.keys import dropout, fold
from rmjax.registry import above, at_least, below, setting
from rmjax.types import Array, Key, ModelContext, Params, SequenceModel, Sum

if TYPE_CHECKING:
    from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a language model; hashable.

    Attributes:
      vocabulary: V.
      positions: length of the longest segment.
      dim: width D; the feed-forward layer is 4 D wide.
      layers: number of layers.
      heads: number of attention heads; divides D.
      dropout: rate for embeddings, attention weights and additions to the residual stream.
      dtype: type of products; norms, softmax and logits are f32.
      initial: standard deviation of untrained kernels and tables; 0.02 suits models several hundred
        wide.
      remat: the backward pass recomputes a layer, of which only the inputs are stored.
    """

    vocabulary: int
    positions: int = 1024
    dim: int = 768
    layers: int = 12
    heads: int = 12
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32
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
    """Settings that all sequence models have."""

    dim: int = setting(512, at_least(1), "width")
    layers: int = setting(5, at_least(1), "layers")
    heads: int = setting(4, at_least(1), "attention heads; divides model.dim")
    dropout: float = setting(0.1, below(0, 1), "dropout rate")
    initial: float = setting(0.02, above(0), "standard deviation of untrained kernels and tables")
    remat: bool = setting(
        False, doc="recomputes layers in the backward pass, which takes less memory and more time"
    )

    def conflicts(self, config: ConfigDict | None = None) -> Iterator[str]:
        """Yields a message for each conflict, see `rmjax.registry.Registry.settings`."""
        if self.dim % self.heads:
            yield "{heads} must divide {dim}"


def size_fields(settings: Settings, context: ModelContext) -> dict[str, Any]:
    """Fields of `Sizes` for a run; the positions are those of one segment.

    Args:
      settings: of the model; fields of subclasses are left out.
      context: of the data.

    Returns:
      {field: value}.
    """
    names = [field.name for field in dataclasses.fields(Settings)]
    return {name: getattr(settings, name) for name in names} | dict(
        vocabulary=context.vocabulary,
        positions=context.segment_length,
        dtype=jnp.dtype(context.dtype),
    )


def build(settings: Settings, context: ModelContext) -> SequenceModel:
    """Builds the plain model, which has no memory, see `rmjax.types.SequenceModel`."""
    return make(Sizes(**size_fields(settings, context)))


def dense(sizes: Sizes, features: int, name: str | None, scale: float | None = None) -> Dense:
    """A linear layer of the model.

    Args:
      sizes: of the model.
      features: width of the output.
      name: of the submodule.
      scale: standard deviation of the untrained kernel; None: `sizes.initial`.

    Returns:
      The layer.
    """
    scale = sizes.initial if scale is None else scale
    return Dense(features, dtype=sizes.dtype, kernel_init=normal(scale), name=name)


def norm(sizes: Sizes, name: str | None) -> nn.LayerNorm:
    """A layer norm of the model, computed in f32 at least."""
    return nn.LayerNorm(epsilon=1e-5, dtype=jnp.promote_types(sizes.dtype, jnp.float32), name=name)


def maybe_remat(
    sizes: Sizes, layer: type[nn.Module], methods: tuple[str, ...] = ("__call__",)
) -> Callable[..., Any]:
    """The layer's class, whose methods are recomputed in the backward pass if `sizes.remat`."""
    return nn.remat(layer, methods=methods) if sizes.remat else layer


class SelfAttention(nn.Module):
    """Causal self-attention within a segment.

    Takes x [B, N, D] and mask bool [B, N]. Returns [B, N, D] and the queries [B, N, H, e].
    """

    sizes: Sizes

    @nn.compact
    def __call__(self, x: Array, mask: Array, key: Key | None) -> tuple[Array, Array]:
        """Applies the module, see the class."""
        s, n = self.sizes, x.shape[1]
        query, keys, value = (
            split_heads(y, s.heads) for y in jnp.split(dense(s, 3 * s.dim, "c_attn")(x), 3, -1)
        )
        seen = jnp.tril(jnp.ones((n, n), bool)) & mask[:, None, None, :]
        out, _ = attend(query, keys, value, seen, lambda w: dropout(w, s.dropout, fold(key, 0)))
        return out.reshape(x.shape), query


class Feedforward(nn.Module):
    """The feed-forward layer, x [..., D] -> [..., D]."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the module, see the class."""
        s = self.sizes
        y = nn.gelu(dense(s, 4 * s.dim, "c_fc")(x), approximate=True)
        return dense(s, s.dim, "c_proj", residual_scale(s))(y)


def residual_scale(sizes: Sizes) -> float:
    """Standard deviation of untrained kernels whose output is added to the residual stream."""
    return sizes.initial / (2 * sizes.layers) ** 0.5


class Block(nn.Module):
    """One layer of GPT-2.

    Takes x [B, N, D], mask bool [B, N] and the layer's memory, which is unused. Returns x and the
    layer's report, which is empty. Other models replace this class by blocks with a memory.
    """

    sizes: Sizes

    @nn.compact
    def __call__(
        self, x: Array, mask: Array, memory: object, key: Key | None
    ) -> tuple[Array, tuple]:
        """Applies the module, see the class."""
        s = self.sizes
        attended, _ = SelfAttention(s, name="attn")(norm(s, "ln_1")(x), mask, fold(key, 0))
        attended = dense(s, s.dim, "attn_c_proj", residual_scale(s))(attended)
        x = x + dropout(attended, s.dropout, fold(key, 1))
        wide = Feedforward(s, name="mlp")(norm(s, "ln_2")(x))
        return x + dropout(wide, s.dropout, fold(key, 2)), ()


class GPT2(nn.Module):
    """The stack of blocks.

    Takes tokens i32 [B, N], mask bool [B, N] and one memory per layer. Returns hidden f32 [B, N, D]
    and one report per layer.

    Attributes:
      sizes: of the model.
      block: class of a layer.
      options: arguments of the block after its sizes.
    """

    sizes: Sizes
    block: type[nn.Module] = Block
    options: tuple[object, ...] = ()

    @nn.compact
    def __call__(
        self, tokens: Array, mask: Array, memories: tuple | None = None, key: Key | None = None
    ) -> tuple[Array, tuple]:
        """Applies the module, see the class."""
        s, reports = self.sizes, []
        check_length(s, tokens)
        words = self.param("wte", normal(s.initial), (s.vocabulary, s.dim))
        places = self.param("wpe", normal(s.initial), (s.positions, s.dim))
        x = (look_up(words, tokens) + places[: tokens.shape[1]]).astype(s.dtype)
        x = dropout(x, s.dropout, fold(key, s.layers))
        for i in range(s.layers):
            block = maybe_remat(s, self.block)(s, *self.options, name=f"h_{i}")
            x, report = block(x, mask, None if memories is None else memories[i], fold(key, i))
            reports.append(report)
        return norm(s, "ln_f")(x), tuple(reports)


def check_length(sizes: Sizes, tokens: Array) -> None:
    """Checks that tokens [B, N] fit the table of positions.

    Raises:
      ValueError: N is larger than `sizes.positions`.
    """
    if tokens.shape[1] > sizes.positions:
        raise ValueError(
            f"a segment of {tokens.shape[1]} tokens is longer than the model's positions "
            f"{sizes.positions}: use shorter segments, or a model with more positions"
        )


def tied_logits(sizes: Sizes) -> Callable[[Params, Array, Key | None], Array]:
    """The `logits` of a language model whose output layer is the word table itself.

    Returns:
      (params, hidden [..., D], key) -> f32 [..., V]; the key is unused.
    """

    def logits(params: Params, hidden: Array, key: Key | None = None) -> Array:
        both = hidden.astype(sizes.dtype), params["wte"].astype(sizes.dtype)
        return jnp.einsum("...d,vd->...v", *both, preferred_element_type=jnp.float32)

    return logits


@flax.struct.dataclass
class Memoryless:
    """The state of a model without memory."""

    segments: Array  # i32 [B] read so far


def init_memoryless(params: Params, batch_size: int) -> Memoryless:
    """The state before the first segment."""
    return Memoryless(jnp.zeros(batch_size, jnp.int32))


def reset_memoryless(state: Memoryless, where: Array) -> Memoryless:
    """The state after the streams `where` bool [B] begin anew."""
    return Memoryless(jnp.where(where, 0, state.segments))


def no_loss() -> Sum:
    """The aux of a model that adds nothing to the loss."""
    return jnp.zeros(()), jnp.zeros(())


def make(sizes: Sizes) -> SequenceModel:
    """The plain Transformer, which reads each segment on its own."""
    module = GPT2(sizes)

    def init(key: Key) -> Params:
        tokens = jnp.zeros((1, 1), jnp.int32)
        return module.init(key, tokens, tokens == 0)["params"]

    def step(
        params: Params, state: Memoryless, tokens: Array, mask: Array, key: Key | None = None
    ) -> tuple[Array, Memoryless, Sum]:
        hidden, _ = module.apply({"params": params}, tokens, mask, None, key)
        return hidden, Memoryless(state.segments + mask.any(-1)), no_loss()

    return SequenceModel(init, init_memoryless, reset_memoryless, step, tied_logits(sizes))
