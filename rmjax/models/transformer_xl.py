"""Transformer-XL (Dai et al. 2019): every layer also sees what it read in the segments before."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from flax.linen.initializers import normal

from rmjax.layers import queue
from rmjax.layers.embeddings import look_up
from rmjax.layers.keys import dropout, fold
from rmjax.layers.queue import Queue
from rmjax.layers.relative import RelativeAttention
from rmjax.models import gpt2
from rmjax.models.gpt2 import Sizes, dense, kept, norm, tied_logits
from rmjax.registry import at_least, setting
from rmjax.types import Array, Key, ModelContext, Params, SequenceModel


class RelativeBlock(nn.Module):
    """x [B, N, D], mask [B, N], memory [B, M, D] with its mask -> x. Norms come after the sums (Dai et al. 2019), or
    with `prenorm` before the layers.
    """

    sizes: Sizes
    same_length: bool = False
    clamp: int = 0
    prenorm: bool = False

    def setup(self):
        s = self.sizes
        self.attention = RelativeAttention(
            s.heads, 0.0, self.same_length, self.clamp, s.dtype, s.initial
        )
        self.attention_norm, self.wide_norm = (norm(s, None) for _ in range(2))
        self.wide, self.narrow = dense(s, 4 * s.dim, None), dense(s, s.dim, None)

    def __call__(
        self, x: Array, mask: Array, memory: Array, memory_mask: Array, key: Key | None
    ) -> Array:
        rate, before, after = self.sizes.dropout, self.attention_norm, self.wide_norm
        if self.prenorm:
            seen = before(memory)
            x = x + dropout(
                self.attention(before(x), mask, seen, memory_mask, fold(key, 0)), rate, fold(key, 1)
            )
            return x + dropout(self.feedforward(after(x), fold(key, 2)), rate, fold(key, 3))
        x = before(
            x
            + dropout(
                self.attention(x, mask, memory, memory_mask, fold(key, 0)), rate, fold(key, 1)
            )
        )
        return after(x + dropout(self.feedforward(x, fold(key, 2)), rate, fold(key, 3)))

    def feedforward(self, x: Array, key: Key | None) -> Array:
        return self.narrow(dropout(nn.relu(self.wide(x)), self.sizes.dropout, key))


class TransformerXL(nn.Module):
    """tokens i32 [B, N], mask [B, N], per layer (memory [B, M, D], mask [B, M]) -> hidden [B, N, D], what went into
    each layer.
    """

    sizes: Sizes
    same_length: bool = False
    clamp: int = 0
    prenorm: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        mask: Array,
        memories: tuple[tuple[Array, Array], ...],
        key: Key | None = None,
    ) -> tuple[Array, tuple[Array, ...]]:
        s, inputs = self.sizes, []
        words = self.param("wte", normal(s.initial), (s.vocabulary, s.dim))
        x = dropout(
            look_up(words, tokens).astype(s.dtype) * s.dim**0.5, s.dropout, fold(key, s.layers)
        )
        for i, (memory, memory_mask) in enumerate(memories):
            inputs.append(x)
            block = kept(s, RelativeBlock)(
                s, self.same_length, self.clamp, self.prenorm, name=f"h_{i}"
            )
            x = block(x, mask, memory, memory_mask, fold(key, i))
        if self.prenorm:
            x = norm(s, "ln_f")(x)
        return dropout(x.astype(jnp.float32), s.dropout, fold(key, s.layers + 1)), tuple(inputs)


@flax.struct.dataclass
class Remembered:
    layers: tuple[Queue, ...]  # the newest M inputs of each layer
    segments: Array  # i32 [B] read so far


def make(
    sizes: Sizes, *, memory: int, same_length: bool = True, clamp: int = 1000
) -> SequenceModel:
    """memory: M, tokens that every layer remembers. same_length, clamp: see `RelativeAttention`; the defaults are those
    of Memoria's experiments.
    """
    if memory < 1:
        raise ValueError(
            f"memory must be at least 1 row, got {memory}; without any there is the plain Transformer"
        )
    module = TransformerXL(sizes, same_length, clamp)

    def memories(state: Any) -> tuple:
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

    def step(params: Params, state: Remembered, tokens: Array, mask: Array, key: Key | None = None):
        hidden, inputs = module.apply({"params": params}, tokens, mask, memories(state), key)
        layers = tuple(queue.push(q, x, mask)[0] for q, x in zip(state.layers, inputs, strict=True))
        return (
            hidden,
            Remembered(layers, state.segments + mask.any(-1)),
            (jnp.zeros(()), jnp.zeros(())),
        )

    return SequenceModel(init, init_state, reset, step, tied_logits(sizes))


@dataclasses.dataclass(frozen=True)
class Settings(gpt2.Settings):
    released = False  # no attribute of a run: whether GPT-2's checkpoints fit
    memory: int = setting(
        0, at_least(0), "transformer_xl, compressive, infinity: rows remembered; 0: a segment's"
    )

    def rows(self, config: Any = None) -> int:
        """That are remembered; 2 where the segment's length is not known."""
        return self.memory or (config.data.segment_length if config is not None else 2)

    def conflicts(self, config: Any = None) -> Iterator[str]:
        yield from super().conflicts(config)
        if config is not None and config.model.pretrained and not self.released:
            yield f"config.model.pretrained: there are no checkpoints for config.model.kind = {config.model.kind!r}"


def build(settings: Settings, context: ModelContext) -> SequenceModel:
    """The model of a run's settings."""
    sizes = Sizes(**gpt2.size_fields(settings, context))
    return make(sizes, memory=settings.memory or context.segment_length)
