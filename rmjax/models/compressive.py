"""The Compressive Transformer (Rae et al. 2020): Transformer-XL whose old memories are compressed, not dropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from rmjax.layers import compressive
from rmjax.layers.attention import attend
from rmjax.layers.compressive import Compressed
from rmjax.models import gpt2, transformer_xl
from rmjax.models.gpt2 import Sizes, split_heads, tied_logits
from rmjax.models.transformer_xl import TransformerXL
from rmjax.registry import at_least, setting
from rmjax.types import Array, Key, ModelContext, Params, SequenceModel, Sum


@flax.struct.dataclass
class Remembered:
    layers: tuple[Compressed, ...]
    segments: Array  # i32 [B] read so far


def make(
    sizes: Sizes, *, memory: int, compressed: int, rate: int = 4, reconstruction: float = 1.0
) -> SequenceModel:
    """memory, compressed: rows of each kind that a layer remembers. rate: inputs in one compressed row.

    reconstruction: weight of the attention-reconstruction loss (Rae et al. 2020, Algorithm 2), its mean over layers.
    Only the compression learns from it; from the rest of the loss it learns where gradients pass between segments.
    """
    module = TransformerXL(sizes, prenorm=True)

    def memories(layers: tuple[Compressed, ...]) -> tuple:
        return tuple((layer.rows, layer.mask) for layer in layers)

    def init(key: Key) -> Params:
        model, compression = jax.random.split(key)
        tokens = jnp.zeros((1, 1), jnp.int32)
        params = module.init(model, tokens, tokens == 0, memories(init_state(None, 1).layers))[
            "params"
        ]
        keys = jax.random.split(compression, sizes.layers)
        each = {
            f"h_{i}": compressive.init_compression(k, sizes.dim, rate) for i, k in enumerate(keys)
        }
        return params | {"compression": each}

    def init_state(params: Params, batch_size: int) -> Remembered:
        layer = compressive.empty(batch_size, memory, compressed, sizes.dim, sizes.dtype)
        return Remembered((layer,) * sizes.layers, jnp.zeros(batch_size, jnp.int32))

    def reset(state: Remembered, where: Array) -> Remembered:
        layers = tuple(compressive.reset(layer, where) for layer in state.layers)
        return Remembered(layers, jnp.where(where, 0, state.segments))

    def step(params: Params, state: Remembered, tokens: Array, mask: Array, key: Key | None = None):
        names = [f"h_{i}" for i in range(sizes.layers)]
        hidden, inputs = module.apply({"params": params}, tokens, mask, memories(state.layers), key)
        layers, lost = [], []
        for name, layer, x in zip(names, state.layers, inputs, strict=True):
            compression = params["compression"][name]
            after, *_ = compressive.push(compression, layer, x, mask)
            layers.append(after)
            if reconstruction:
                lost.append(reconstruction_loss(params[name], compression, sizes, layer, x, mask))
        aux = (jnp.zeros(()), jnp.zeros(()))
        if lost:
            total, count = (sum(part) / len(lost) for part in zip(*lost, strict=True))
            aux = (reconstruction * total, count)
        return hidden, Remembered(tuple(layers), state.segments + mask.any(-1)), aux

    return SequenceModel(init, init_state, reset, step, tied_logits(sizes))


def reconstruction_loss(
    block: Params, compression: Params, sizes: Sizes, layer: Any, x: Array, mask: Array
) -> Sum:
    """How far attention of x [B, N, D] to what falls out of the memory is from that to what it is compressed to:
    (sum of squares over the width, count of the queries that have something to look back at).
    """
    block, layer, x = jax.lax.stop_gradient((block, layer, x))
    _, (old, old_mask), (new, new_mask) = compressive.push(compression, layer, x, mask)
    project = lambda name, y: split_heads(
        y @ block["attention"][name]["kernel"].T.astype(y.dtype), sizes.heads
    )
    norm = lambda y: layer_norm(block["attention_norm"], y)

    def attended(rows: Array, rows_mask: Array) -> Array:
        rows = norm(rows)
        seen = rows_mask[:, None, None, :]
        return attend(
            project("query", norm(x)), project("key", rows), project("value", rows), seen
        )[0]

    error = (attended(old, old_mask) - attended(new, new_mask)).astype(jnp.float32)
    counted = mask & old_mask.any(-1, keepdims=True)
    return jnp.where(
        counted[..., None, None], error**2, 0.0
    ).sum() / sizes.dim, counted.sum().astype(jnp.float32)


def layer_norm(params: Params, x: Array) -> Array:
    x = x.astype(jnp.float32)
    centered = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
    return centered * scale * params["scale"] + params["bias"]


@dataclasses.dataclass(frozen=True)
class Settings(transformer_xl.Settings):
    compression: int = setting(
        4, at_least(1), "compressive: inputs in one row; half of the rows are compressed"
    )
    reconstruction: float = setting(
        1.0, at_least(0), "compressive: weight of the attention-reconstruction loss"
    )

    def conflicts(self, config: Any = None) -> Iterator[str]:
        yield from super().conflicts(config)
        if self.rows(config) < 2:
            yield f"{{memory}}: that is {self.rows(config)} rows (0: a segment's); must be at least 2"


def build(settings: Settings, context: ModelContext) -> SequenceModel:
    """The model of a run's settings; half of the rows that it remembers are compressed."""
    length = settings.memory or context.segment_length
    sizes, recent = Sizes(**gpt2.size_fields(settings, context)), length // 2
    how = dict(memory=recent, compressed=length - recent, rate=settings.compression)
    return make(sizes, **how, reconstruction=settings.reconstruction)
