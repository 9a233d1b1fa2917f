"""Memoria BERT and RoBERTa (Memoria section 4.3, Figure 8): one layer's output makes working engrams of the segment
itself, and the layers above it look at them and at those that they remind of.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from rmjax import memoria
from rmjax.layers.keys import fold
from rmjax.models import bert, gpt2
from rmjax.models.bert import Attention, Embeddings, Head, Layer, Sizes, head_logits
from rmjax.models.gpt2 import kept
from rmjax.models.memoria_gpt2 import Abstractor, check_ties, latest
from rmjax.types import Array, Key, ModelContext, Params, SequenceModel


class MemoryLayer(Layer):
    """BERT's, which between its two parts looks at working engrams, then at reminded ones, by one attention of its own.

    -> x, how much its heads and queries looked at each reminded engram, f32 [B, k].
    """

    def setup(self):
        super().setup()
        self.memory_attention = Attention(self.sizes)

    def remember(
        self, x: Array, mask: Array, working: Array, reminded: Array, valid: Array, key: Key | None
    ) -> tuple[Array, Array]:
        x, _ = self.attention(x, x, mask, fold(key, 0))
        x, _ = self.memory_attention(x, working, jnp.ones(working.shape[:2], bool), fold(key, 2))
        seen, weights = self.memory_attention(x, reminded, valid, fold(key, 3))
        x = jnp.where(valid.any(-1)[:, None, None], seen, x)  # nothing to look at changes nothing
        return self.feedforward(x, fold(key, 1)), jax.vmap(memoria.contribution)(weights, mask)


class MemoriaBert(nn.Module):
    """The layers below and with `memory_layer` in `below`, the abstractor, and the others in `above`."""

    sizes: Sizes
    engrams: int
    memory_layer: int
    activation: str = "relu"

    def setup(self):
        s = self.sizes
        self.embeddings = Embeddings(s)
        below, last = self.memory_layer + 1, s.layers
        plain, remembering = kept(s, Layer), kept(s, MemoryLayer, ("remember",))
        self.layer = [plain(s) for _ in range(below)] + [remembering(s) for _ in range(below, last)]
        self.abstractor = Abstractor(self.engrams, self.activation, s.dtype, s.initial)

    def below(self, tokens: Array, mask: Array, key: Key | None) -> tuple[Array, Array]:
        """-> x [B, N, D], working engrams [B, N_wm, D]."""
        x = self.embeddings(tokens, mask, None, fold(key, self.sizes.layers))
        for i, layer in enumerate(self.layer[: self.memory_layer + 1]):
            x = layer(x, mask, fold(key, i))
        return x, self.abstractor(x, mask)

    def above(
        self, x: Array, mask: Array, working: Array, reminded: Array, valid: Array, key: Key | None
    ) -> tuple[Array, Array]:
        """-> hidden [B, N, D], f32 [B, k] the mean over layers."""
        first, told = self.memory_layer + 1, []
        for i, layer in enumerate(self.layer[first:], first):
            x, looked = layer.remember(x, mask, working, reminded, valid, fold(key, i))
            told.append(looked)
        return x, sum(told) / len(told)

    def __call__(
        self, tokens: Array, mask: Array, reminded: Array, valid: Array
    ) -> tuple[Array, Array]:
        x, working = self.below(tokens, mask, None)
        return self.above(x, mask, working, reminded, valid, None)


@flax.struct.dataclass
class Remembered:
    engrams: memoria.State  # leading axis B
    segments: Array  # i32 [B] read so far
    record: memoria.Record  # [B, C] of who was there, and reminded, in the last segment


def make(
    sizes: Sizes,
    classes: int,
    config: memoria.MemoriaConfig,
    *,
    memory_layer: int = 9,
    activation: str = "relu",
) -> SequenceModel:
    """config: of the engrams; its `dim` must be the model's. memory_layer: whose output for the segment itself the
    abstractor sees, with gradients; what is stored has none. logits [B, classes] of hidden [B, N, D].
    """
    if config.dim != sizes.dim:
        raise ValueError(
            f"engrams of width {config.dim} do not go into a model of width {sizes.dim}"
        )
    if not 0 <= memory_layer < sizes.layers - 1:
        raise ValueError(
            f"memory_layer must be one of 0 .. {sizes.layers - 2}, below the last, got {memory_layer}"
        )
    check_ties(config)
    module, head = (
        MemoriaBert(sizes, config.working, memory_layer, activation),
        Head(sizes, classes),
    )
    recalls = config.remind_short_term + config.remind_long_term

    def init(key: Key) -> Params:
        tokens, keys = jnp.zeros((1, 1), jnp.int32), jax.random.split(key)
        none = jnp.zeros((1, recalls, sizes.dim)), jnp.zeros((1, recalls), bool)
        (hidden, _), params = module.init_with_output(keys[0], tokens, tokens == 0, *none)
        return params["params"] | head.init(keys[1], hidden)["params"]

    def init_state(params: Params, batch_size: int) -> Remembered:
        engrams = memoria.fork(memoria.init(config), batch_size)
        return Remembered(engrams, jnp.zeros(batch_size, jnp.int32), memoria.empty_record(engrams))

    def reset(state: Remembered, where: Array) -> Remembered:
        engrams = memoria.reset(state.engrams, where)
        record = latest(state.record, memoria.empty_record(engrams), where)
        return Remembered(engrams, jnp.where(where, 0, state.segments), record)

    def step(params: Params, state: Remembered, tokens: Array, mask: Array, key: Key | None = None):
        alive, run = mask.any(-1), functools.partial(module.apply, {"params": params})
        x, working = cast(tuple, run(tokens, mask, key, method="below"))
        remind = functools.partial(memoria.remind, config)
        engrams, reminded = jax.vmap(remind)(
            state.engrams, working, fold(key, sizes.layers + 1), alive
        )
        record = latest(state.record, jax.vmap(memoria.record)(engrams, reminded), alive)
        recalled = reminded.engrams.astype(sizes.dtype), reminded.valid
        hidden, weights = cast(tuple, run(x, mask, working, *recalled, key, method="above"))
        finish = functools.partial(memoria.memorize_and_forget, config)
        engrams = jax.vmap(finish)(engrams, reminded, weights, alive)
        return (
            hidden,
            Remembered(engrams, state.segments + alive, record),
            (jnp.zeros(()), jnp.zeros(())),
        )

    return SequenceModel(init, init_state, reset, step, functools.partial(head_logits, head))


@dataclasses.dataclass(frozen=True)
class Settings(gpt2.Settings):
    """The rules of its memory are a section of their own, config.memoria."""

    def conflicts(self, config: Any = None) -> Iterator[str]:
        yield from super().conflicts(config)
        last = self.layers - 2
        if last < 0:
            yield "{layers}: two are needed, one of them above its memory"
        elif config is not None and config.memoria.layer > last:
            cure = f"must be at most {last}, for {{layers}}, of which one is above it"
            yield f"config.memoria.layer = {config.memoria.layer}: {cure}"


def build_upon(sizes: Sizes, context: ModelContext) -> SequenceModel:
    """Memoria on an encoder of these sizes."""
    engrams = context.engrams
    layer = sizes.layers - 2 if engrams.layer < 0 else engrams.layer
    rules = dataclasses.replace(engrams.rules, dim=sizes.dim, max_segments=context.max_segments)
    return make(sizes, context.classes, rules, memory_layer=layer, activation=engrams.activation)


def build(settings: Settings, context: ModelContext) -> SequenceModel:
    """The classifier of a run's settings."""
    return build_upon(bert.sizes_of(settings, context), context)
