"""BERT (Devlin et al. 2018) and RoBERTa (Liu et al. 2019): encoders whose norms come after the sums.

Names of parameters are those of the released checkpoints, so that `rmjax.models.huggingface` only has to rename.
A model that does something between two layers is made of the same `Embeddings`, `Layer` and `Head`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import normal

from rmjax.layers.attention import attend
from rmjax.layers.dense import Dense
from rmjax.layers.embeddings import look_up
from rmjax.layers.keys import dropout, fold
from rmjax.models import gpt2
from rmjax.models.gpt2 import Nothing, dense, kept, split_heads
from rmjax.types import Array, Key, ModelContext, Params, SequenceModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes(gpt2.Sizes):
    """Of an encoder, BERT's where nothing is given; `roberta` gives RoBERTa's.

    Attributes:
      positions: rows of the table of positions.
      types: of tokens; BERT's are two, one for each of two sentences.
      padding: the position of padded tokens; the others are counted from the next one, past whatever is padded between
        them. None: tokens are at 0, 1, ..., padded or not.
      epsilon: of the norms.
      early_dropout: the head drops what it reads too, before the pooler.
    """

    positions: int = 512
    types: int = 2
    padding: int | None = None
    epsilon: float = 1e-12
    early_dropout: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.types < 1:
            raise ValueError(f"types must be at least 1, got {self.types}")
        if self.longest < 1:
            raise ValueError(
                f"positions={self.positions} with padding={self.padding} has room for no token"
            )

    @property
    def longest(self) -> int:
        """How many tokens there are positions for."""
        return self.positions - (0 if self.padding is None else self.padding + 1)


def roberta(**sizes: Any) -> Sizes:
    """RoBERTa's where nothing is given: 512 tokens at positions 2 to 513, one type."""
    given: dict[str, Any] = dict(
        positions=514, types=1, padding=1, epsilon=1e-5, early_dropout=True
    )
    return Sizes(**given | sizes)


def norm(sizes: Sizes, name: str | None) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=sizes.epsilon, dtype=jnp.promote_types(sizes.dtype, jnp.float32), name=name
    )


class Embeddings(nn.Module):
    """tokens i32 [B, N], mask bool [B, N], types i32 [B, N] (None: all are of type 0) -> f32 [B, N, D]."""

    sizes: Sizes

    @nn.compact
    def __call__(
        self, tokens: Array, mask: Array, types: Array | None = None, key: Key | None = None
    ) -> Array:
        s, n = self.sizes, tokens.shape[1]
        if n > s.longest:
            raise ValueError(
                f"a segment of {n} tokens is longer than the {s.longest} that the model has positions for"
            )
        table = lambda name, rows: self.param(
            f"{name}_embeddings", normal(self.sizes.initial), (rows, s.dim)
        )
        words, places, kinds = (
            table("word", s.vocabulary),
            table("position", s.positions),
            table("token_type", s.types),
        )
        x = (
            look_up(words, tokens)
            + places[positions(s, mask)]
            + look_up(kinds, jnp.int32(0) if types is None else types)
        )
        return dropout(norm(s, "LayerNorm")(x), s.dropout, key)


def positions(sizes: Sizes, mask: Array) -> Array:
    """Mask bool [B, N] -> i32 [N], or [B, N] where padded tokens have a position of their own."""
    if sizes.padding is None:
        return jnp.arange(mask.shape[1])
    return jnp.cumsum(mask, -1) * mask + sizes.padding


class Attention(nn.Module):
    """norm(x + what x [B, X, D] attends to): itself, or any context [B, Y, D] with mask bool [B, Y].

    -> [B, X, D], weights f32 [B, H, X, Y] before dropout, zero where the mask is false. Of nothing to attend to the
    output's bias and the norm remain.
    """

    sizes: Sizes

    @nn.compact
    def __call__(
        self, x: Array, context: Array, mask: Array, key: Key | None = None
    ) -> tuple[Array, Array]:
        s = self.sizes
        project = lambda name, y: split_heads(dense(s, s.dim, name)(y), s.heads)
        query, keys, value = project("query", x), project("key", context), project("value", context)
        out, weights = attend(
            query, keys, value, mask[:, None, None], lambda w: dropout(w, s.dropout, fold(key, 0))
        )
        out = dense(s, s.dim, "output")(out.reshape(x.shape))
        return norm(s, "LayerNorm")(x + dropout(out, s.dropout, fold(key, 1))), weights


class Layer(nn.Module):
    """x [B, N, D], mask bool [B, N] -> f32 [B, N, D]. One that attends to more does so between the two parts."""

    sizes: Sizes

    def setup(self):
        s = self.sizes
        self.attention, self.LayerNorm = Attention(s), norm(s, None)
        self.intermediate, self.output = dense(s, 4 * s.dim, None), dense(s, s.dim, None)

    def __call__(self, x: Array, mask: Array, key: Key | None = None) -> Array:
        return self.feedforward(self.attention(x, x, mask, fold(key, 0))[0], fold(key, 1))

    def feedforward(self, x: Array, key: Key | None = None) -> Array:
        y = self.output(nn.gelu(self.intermediate(x), approximate=False))
        return self.LayerNorm(x + dropout(y, self.sizes.dropout, key))


class Bert(nn.Module):
    """tokens i32 [B, N], mask bool [B, N], types i32 [B, N] (None: all are of type 0) -> hidden f32 [B, N, D]."""

    sizes: Sizes

    def setup(self):
        self.embeddings = Embeddings(self.sizes)
        self.layer = [kept(self.sizes, Layer)(self.sizes) for _ in range(self.sizes.layers)]

    def __call__(
        self, tokens: Array, mask: Array, types: Array | None = None, key: Key | None = None
    ) -> Array:
        x = self.embeddings(tokens, mask, types, fold(key, self.sizes.layers))
        for i, layer in enumerate(self.layer):
            x = layer(x, mask, fold(key, i))
        return x


class Head(nn.Module):
    """hidden [B, N, D] -> f32 [B, classes], of each row's first token ([CLS], <s>) alone."""

    sizes: Sizes
    classes: int

    @nn.compact
    def __call__(self, hidden: Array, key: Key | None = None) -> Array:
        s, x = self.sizes, hidden[:, 0]
        if s.early_dropout:
            x = dropout(x, s.dropout, fold(key, 0))
        x = dropout(jnp.tanh(dense(s, s.dim, "pooler")(x)), s.dropout, fold(key, 1))
        return Dense(self.classes, kernel_init=normal(self.sizes.initial), name="classifier")(
            x.astype(jnp.float32)
        )


class Classifier(NamedTuple):
    """Of texts, as a bundle of pure functions."""

    init: Callable[[Key], Params]
    """init(key) -> params."""
    logits: Callable[..., Array]
    """logits(params, tokens i32 [B,N], mask bool [B,N], key=None [B], types=None i32 [B,N]) -> f32 [B, classes].
    With a key: dropout."""


def make_classifier(sizes: Sizes, classes: int) -> Classifier:
    if classes < 1:
        raise ValueError(f"classes must be at least 1, got {classes}")
    encoder, head = Bert(sizes), Head(sizes, classes)

    def init(key: Key) -> Params:
        tokens, keys = jnp.zeros((1, 1), jnp.int32), jax.random.split(key)
        hidden, params = encoder.init_with_output(keys[0], tokens, tokens == 0)
        return params["params"] | head.init(keys[1], hidden)["params"]

    def logits(
        params: Params,
        tokens: Array,
        mask: Array,
        key: Key | None = None,
        types: Array | None = None,
    ):
        hidden = encoder.apply({"params": params}, tokens, mask, types, fold(key, 0))
        return head.apply({"params": params}, hidden, fold(key, 1))

    return Classifier(init, logits)


def make_plain(sizes: Sizes, classes: int) -> SequenceModel:
    """BERT or RoBERTa, each segment on its own; logits [B, classes] of hidden [B, N, D]."""
    encoder, head = Bert(sizes), Head(sizes, classes)

    def init(key: Key) -> Params:
        tokens, keys = jnp.zeros((1, 1), jnp.int32), jax.random.split(key)
        hidden, params = encoder.init_with_output(keys[0], tokens, tokens == 0)
        return params["params"] | head.init(keys[1], hidden)["params"]

    def init_state(params: Params, batch_size: int) -> Nothing:
        return Nothing(jnp.zeros(batch_size, jnp.int32))

    def reset(state: Nothing, where: Array) -> Nothing:
        return Nothing(jnp.where(where, 0, state.segments))

    def step(params: Params, state: Nothing, tokens: Array, mask: Array, key: Key | None = None):
        hidden = encoder.apply({"params": params}, tokens, mask, None, key)
        return hidden, Nothing(state.segments + mask.any(-1)), (jnp.zeros(()), jnp.zeros(()))

    return SequenceModel(init, init_state, reset, step, functools.partial(head_logits, head))


def head_logits(head: Head, params: Params, hidden: Array, key: Key | None = None) -> Array:
    return cast(Any, head.apply({"params": params}, hidden, key))


Settings = gpt2.Settings


def sizes_of(settings: Settings, context: ModelContext) -> Sizes:
    """BERT's, with a position for each token of a segment."""
    return Sizes(**gpt2.size_fields(settings, context))


def build(settings: Settings, context: ModelContext) -> SequenceModel:
    """The classifier of a run's settings, which remembers nothing."""
    return make_plain(sizes_of(settings, context), context.classes)
