"""Transformer-XL (Dai et al. 2019): each layer also attends to its inputs in earlier segments."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from flax.linen.initializers import normal

from rmjax.layers import queue
from rmjax.layers.embeddings import look_up
from rmjax.layers.keys import dropout, fold
from rmjax.layers.queue import Queue
from rmjax.layers.relative import RelativeBlock
from rmjax.models import gpt2
from rmjax.models.gpt2 import Sizes, maybe_remat, no_loss, norm, tied_logits
from rmjax.registry import at_least, setting
from rmjax.types import Array, Key, ModelContext, Params, SequenceModel, Sum

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Memories = tuple[tuple[Array, Array], ...]
"""For each layer, the memory [B, M, D] and its mask bool [B, M]."""


class TransformerXL(nn.Module):
    """The stack of layers.

    Takes tokens i32 [B, N], mask [B, N] and `Memories`. Returns hidden [B, N, D] and the inputs of
    each layer. For the attributes see `RelativeBlock`.
    """

    sizes: Sizes
    same_length: bool = False
    clamp: int = 0
    prenorm: bool = False

    @nn.compact
    def __call__(
        self, tokens: Array, mask: Array, memories: Memories, key: Key | None = None
    ) -> tuple[Array, tuple[Array, ...]]:
        """Applies the module, see the class."""
        s, inputs = self.sizes, []
        words = self.param("wte", normal(s.initial), (s.vocabulary, s.dim))
        x = look_up(words, tokens).astype(s.dtype) * s.dim**0.5
        x = dropout(x, s.dropout, fold(key, s.layers))
        block = partial(
            maybe_remat(s, RelativeBlock), s.heads, s.dropout, self.same_length, self.clamp,
            prenorm=self.prenorm, dtype=s.dtype, initial=s.initial,
        )  # fmt: skip
        for i, (memory, memory_mask) in enumerate(memories):
            inputs.append(x)
            x = block(name=f"h_{i}")(x, mask, memory, memory_mask, fold(key, i))
        if self.prenorm:
            x = norm(s, "ln_f")(x)
        return dropout(x.astype(jnp.float32), s.dropout, fold(key, s.layers + 1)), tuple(inputs)


@flax.struct.dataclass
class Remembered:
    """The state."""

    layers: tuple[Queue, ...]  # the newest M inputs of each layer
    segments: Array  # i32 [B] read so far


def make(
    sizes: Sizes, *, memory: int, same_length: bool = True, clamp: int = 1000
) -> SequenceModel:
    """Builds a Transformer-XL; the defaults are those of Memoria's experiments.

    Args:
      sizes: of the model.
      memory: M, the number of tokens that each layer remembers.
      same_length: see `RelativeAttention`.
      clamp: see `RelativeAttention`.

    Returns:
      The model.

    Raises:
      ValueError: `memory` is below 1.
    """
    if memory < 1:
        raise ValueError(
            f"memory must be at least 1 row, got {memory}: for no memory use the plain Transformer"
        )
    module = TransformerXL(sizes, same_length, clamp)

    def memories(state: Remembered) -> Memories:
        return tuple((q.rows, q.mask) for q in state.layers)

    def init(key: Key) -> Params:
        tokens = jnp.zeros((1, 1), jnp.int32)
        return module.init(key, tokens, tokens == 0, memories(init_state(None, 1)))["params"]

    def init_state(params: Params, batch_size: int) -> Remembered:
        layers = tuple(
            queue.empty(batch_size, memory, sizes.dim, sizes.dtype) for _ in range(sizes.layers)
        )
        return Remembered(layers, jnp.zeros(batch_size, jnp.int32))

    def reset(state: Remembered, where: Array) -> Remembered:
        layers = tuple(queue.reset(q, where) for q in state.layers)
        return Remembered(layers, jnp.where(where, 0, state.segments))

    def step(
        params: Params, state: Remembered, tokens: Array, mask: Array, key: Key | None = None
    ) -> tuple[Array, Remembered, Sum]:
        hidden, inputs = module.apply({"params": params}, tokens, mask, memories(state), key)
        layers = tuple(queue.push(q, x, mask)[0] for q, x in zip(state.layers, inputs, strict=True))
        return hidden, Remembered(layers, state.segments + mask.any(-1)), no_loss()

    return SequenceModel(init, init_state, reset, step, tied_logits(sizes))


@dataclasses.dataclass(frozen=True)
class Settings(gpt2.Settings):
    """Settings of models that remember rows."""

    released = False  # no setting: whether GPT-2's checkpoints fit the model
    memory: int = setting(
        0, at_least(0), "transformer_xl, compressive, infinity: rows remembered; 0: a segment's"
    )

    def rows(self, config: ConfigDict | None = None) -> int:
        """Number of rows remembered; 2 where the segment's length is unknown and needed."""
        return self.memory or (config.data.segment_length if config is not None else 2)

    def conflicts(self, config: ConfigDict | None = None) -> Iterator[str]:
        """Yields a message for each conflict, see `rmjax.registry.Registry.settings`."""
        yield from super().conflicts(config)
        if config is not None and config.model.pretrained and not self.released:
            kind = config.model.kind
            yield f"config.model.pretrained: no checkpoints fit config.model.kind = {kind!r}"


def build(settings: Settings, context: ModelContext) -> SequenceModel:
    """Builds the model, see `rmjax.types.SequenceModel`."""
    sizes = Sizes(**gpt2.size_fields(settings, context))
    return make(sizes, memory=settings.memory or context.segment_length)
