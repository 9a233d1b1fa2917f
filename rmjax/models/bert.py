"""BERT (Devlin et al. 2018) and RoBERTa (Liu et al. 2019): encoders with norms after the sums.

Parameters have the names of the released checkpoints, so `rmjax.models.huggingface` only renames. A
model that does something between two layers is built from the same `Embeddings`, `Layer` and
`Head`.
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

from rmjax.layers.attention import attend, split_heads
from rmjax.layers.dense import Dense
from rmjax.layers.embeddings import look_up
from rmjax.layers.keys import dropout, fold
from rmjax.models import gpt2
from rmjax.models.gpt2 import Memoryless, dense, maybe_remat, no_loss
from rmjax.types import Array, Key, ModelContext, Params, SequenceModel, Sum


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes(gpt2.Sizes):
    """Sizes of an encoder; the defaults are BERT's, see `roberta_sizes` for RoBERTa's.

    Attributes:
      positions: rows of the table of positions.
      types: number of token types; BERT has two, one for each of two sentences.
      padding: position of padded tokens. The other tokens are counted from the next position, and
        padded tokens between them are not counted. None: tokens are at 0, 1, ..., padded or not.
      epsilon: of the norms.
      early_dropout: the head drops its input too, before the pooler.
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
        """The most tokens that the positions suffice for."""
        return self.positions - (0 if self.padding is None else self.padding + 1)


def roberta_sizes(**sizes: Any) -> Sizes:
    """RoBERTa's sizes: 512 tokens at positions 2 to 513, one token type.

    Args:
      **sizes: fields of `Sizes` with other values.

    Returns:
      The sizes.
    """
    defaults: dict[str, Any] = dict(
        positions=514, types=1, padding=1, epsilon=1e-5, early_dropout=True
    )
    return Sizes(**defaults | sizes)


def norm(sizes: Sizes, name: str | None) -> nn.LayerNorm:
    """A layer norm of the model, computed in f32 at least."""
    dtype = jnp.promote_types(sizes.dtype, jnp.float32)
    return nn.LayerNorm(epsilon=sizes.epsilon, dtype=dtype, name=name)


class Embeddings(nn.Module):
    """The sum of the embeddings of words, positions and types, normed.

    Takes tokens i32 [B, N], mask bool [B, N] and types i32 [B, N]; None: all are of type 0.
    Returns f32 [B, N, D].
    """

    sizes: Sizes

    @nn.compact
    def __call__(
        self, tokens: Array, mask: Array, types: Array | None = None, key: Key | None = None
    ) -> Array:
        """Applies the module, see the class."""
        s, n = self.sizes, tokens.shape[1]
        if n > s.longest:
            raise ValueError(
                f"a segment of {n} tokens is longer than the {s.longest} that the model has "
                "positions for: use shorter segments, or a model with more positions"
            )
        init = normal(s.initial)
        words = self.param("word_embeddings", init, (s.vocabulary, s.dim))
        places = self.param("position_embeddings", init, (s.positions, s.dim))
        kinds = self.param("token_type_embeddings", init, (s.types, s.dim))
        kind = look_up(kinds, jnp.int32(0) if types is None else types)
        x = look_up(words, tokens) + places[positions(s, mask)] + kind
        return dropout(norm(s, "LayerNorm")(x), s.dropout, key)


def positions(sizes: Sizes, mask: Array) -> Array:
    """The positions of tokens.

    Args:
      sizes: of the model.
      mask: bool [B, N].

    Returns:
      i32 [N], or [B, N] where padded tokens have a position of their own.
    """
    if sizes.padding is None:
        return jnp.arange(mask.shape[1])
    return jnp.cumsum(mask, -1) * mask + sizes.padding


class Attention(nn.Module):
    """norm(x + attention of x to a context), where the context is x itself or any other rows.

    Takes x [B, X, D], context [B, Y, D] and mask bool [B, Y]. Returns [B, X, D], and the weights
    f32 [B, H, X, Y] before dropout, which are zero where the mask is false. Where nothing is in the
    context, the output's bias and the norm remain.
    """

    sizes: Sizes

    @nn.compact
    def __call__(
        self, x: Array, context: Array, mask: Array, key: Key | None = None
    ) -> tuple[Array, Array]:
        """Applies the module, see the class."""
        s = self.sizes
        project = lambda name, y: split_heads(dense(s, s.dim, name)(y), s.heads)
        query, keys, value = project("query", x), project("key", context), project("value", context)
        drop = lambda w: dropout(w, s.dropout, fold(key, 0))
        out, weights = attend(query, keys, value, mask[:, None, None], drop)
        out = dense(s, s.dim, "output")(out.reshape(x.shape))
        return norm(s, "LayerNorm")(x + dropout(out, s.dropout, fold(key, 1))), weights


class Layer(nn.Module):
    """One layer: self-attention, then `feedforward`.

    Takes x [B, N, D] and mask bool [B, N]. Returns f32 [B, N, D]. A subclass with another attention
    puts it between the two parts.
    """

    sizes: Sizes

    def setup(self):
        """Creates the submodules."""
        s = self.sizes
        self.attention, self.LayerNorm = Attention(s), norm(s, None)
        self.intermediate, self.output = dense(s, 4 * s.dim, None), dense(s, s.dim, None)

    def __call__(self, x: Array, mask: Array, key: Key | None = None) -> Array:
        """Applies the module, see the class."""
        return self.feedforward(self.attention(x, x, mask, fold(key, 0))[0], fold(key, 1))

    def feedforward(self, x: Array, key: Key | None = None) -> Array:
        """The second part: norm(x + feed-forward layer), x [B, N, D] -> [B, N, D]."""
        y = self.output(nn.gelu(self.intermediate(x), approximate=False))
        return self.LayerNorm(x + dropout(y, self.sizes.dropout, key))


class Bert(nn.Module):
    """The embeddings and the stack of layers.

    Takes tokens i32 [B, N], mask bool [B, N] and types i32 [B, N]; None: all are of type 0.
    Returns hidden f32 [B, N, D].
    """

    sizes: Sizes

    def setup(self):
        """Creates the submodules."""
        self.embeddings = Embeddings(self.sizes)
        self.layer = [maybe_remat(self.sizes, Layer)(self.sizes) for _ in range(self.sizes.layers)]

    def __call__(
        self, tokens: Array, mask: Array, types: Array | None = None, key: Key | None = None
    ) -> Array:
        """Applies the module, see the class."""
        x = self.embeddings(tokens, mask, types, fold(key, self.sizes.layers))
        for i, layer in enumerate(self.layer):
            x = layer(x, mask, fold(key, i))
        return x


class Head(nn.Module):
    """The classifier's head, hidden [B, N, D] -> f32 [B, classes].

    It reads only the first token of each row ([CLS] in BERT, <s> in RoBERTa).
    """

    sizes: Sizes
    classes: int

    @nn.compact
    def __call__(self, hidden: Array, key: Key | None = None) -> Array:
        """Applies the module, see the class."""
        s, x = self.sizes, hidden[:, 0]
        if s.early_dropout:
            x = dropout(x, s.dropout, fold(key, 0))
        x = dropout(jnp.tanh(dense(s, s.dim, "pooler")(x)), s.dropout, fold(key, 1))
        last = Dense(self.classes, kernel_init=normal(s.initial), name="classifier")
        return last(x.astype(jnp.float32))


def init_head(encoder: Bert, head: Head, key: Key) -> Params:
    """Draws the parameters of an encoder and a head."""
    tokens, keys = jnp.zeros((1, 1), jnp.int32), jax.random.split(key)
    hidden, params = encoder.init_with_output(keys[0], tokens, tokens == 0)
    return params["params"] | head.init(keys[1], hidden)["params"]


def head_logits(head: Head, params: Params, hidden: Array, key: Key | None = None) -> Array:
    """The head's logits f32 [B, classes] of hidden [B, N, D]; the key [B] draws dropout."""
    return cast(Array, head.apply({"params": params}, hidden, key))


class Classifier(NamedTuple):
    """A classifier of texts as a bundle of pure functions."""

    init: Callable[[Key], Params]
    """init(key): draws parameters."""
    logits: Callable[..., Array]
    """logits(params, tokens, mask, key=None, types=None): scores the classes of texts.

    Args:
      params: of `init`.
      tokens: i32 [B, N].
      mask: bool [B, N].
      key: [B], draws dropout; None: no dropout.
      types: i32 [B, N]; None: all are of type 0.

    Returns:
      f32 [B, classes].
    """


def make_classifier(sizes: Sizes, classes: int) -> Classifier:
    """Builds a classifier of texts that fit into one segment.

    Args:
      sizes: of the encoder.
      classes: number of classes.

    Returns:
      The classifier.

    Raises:
      ValueError: `classes` is below 1.
    """
    if classes < 1:
        raise ValueError(f"classes must be at least 1, got {classes}")
    encoder, head = Bert(sizes), Head(sizes, classes)

    def logits(
        params: Params,
        tokens: Array,
        mask: Array,
        key: Key | None = None,
        types: Array | None = None,
    ) -> Array:
        hidden = encoder.apply({"params": params}, tokens, mask, types, fold(key, 0))
        return head_logits(head, params, cast(Array, hidden), fold(key, 1))

    return Classifier(functools.partial(init_head, encoder, head), logits)


def make_plain(sizes: Sizes, classes: int) -> SequenceModel:
    """BERT or RoBERTa without memory: it reads each segment on its own.

    Args:
      sizes: of the encoder.
      classes: number of classes.

    Returns:
      The model; its `logits` are f32 [B, classes] of hidden [B, N, D].
    """
    encoder, head = Bert(sizes), Head(sizes, classes)

    def step(
        params: Params, state: Memoryless, tokens: Array, mask: Array, key: Key | None = None
    ) -> tuple[Array, Memoryless, Sum]:
        hidden = encoder.apply({"params": params}, tokens, mask, None, key)
        return cast(Array, hidden), Memoryless(state.segments + mask.any(-1)), no_loss()

    return SequenceModel(
        functools.partial(init_head, encoder, head),
        gpt2.init_memoryless,
        gpt2.reset_memoryless,
        step,
        functools.partial(head_logits, head),
        has_loss=False,
    )


Settings = gpt2.Settings


def sizes_of(settings: Settings, context: ModelContext) -> Sizes:
    """BERT's sizes for a run; the positions are those of one segment."""
    return Sizes(**gpt2.size_fields(settings, context))


def build(settings: Settings, context: ModelContext) -> SequenceModel:
    """Builds the classifier without memory, see `rmjax.types.SequenceModel`."""
    return make_plain(sizes_of(settings, context), context.classes)
