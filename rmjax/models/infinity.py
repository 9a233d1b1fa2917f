"""The infinity-former (Martins et al. 2021) on GPT-2, with the long-term memory only.

Memoria's experiments use it in this form. The past is a continuous signal x(t) = B^T psi(t) on
[0, 1]: coefficients B of Gaussian basis functions psi, fitted by ridge regression. A new segment
takes the interval (tau, 1], and the past shrinks to (0, tau]; so the state never grows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.initializers import normal

from rmjax.layers.attention import split_heads
from rmjax.layers.keys import dropout, fold
from rmjax.models import gpt2, transformer_xl
from rmjax.models.gpt2 import (
    GPT2,
    Feedforward,
    SelfAttention,
    Sizes,
    dense,
    norm,
    residual_scale,
    tied_logits,
)
from rmjax.registry import setting
from rmjax.types import Array, Key, ModelContext, Params, SequenceModel, Sum

if TYPE_CHECKING:
    from ml_collections import ConfigDict

WIDTHS = (0.005, 0.01)  # of the basis functions
RIDGE = 0.5  # penalty of the ridge regression
BINS = 128  # of the histogram of attention over time
LEAST_VARIANCE = 1e-4  # of a query's attention over time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signal:
    """The signal of a layer.

    Attributes:
      segment_length: L, rows of a segment.
      basis: number of Gaussian basis functions.
      samples: number of times at which the old signal is read when it is fitted anew.
      tau: share of [0, 1] that the past keeps.
      sticky: samples lie at equal steps of the attention's mass; otherwise at equal steps of time.
      prior: sigma_0 of the Kullback-Leibler loss.
      weight: of the Kullback-Leibler loss.
    """

    segment_length: int
    basis: int
    samples: int
    tau: float = 0.5
    sticky: bool = True
    prior: float = 0.05
    weight: float = 1e-6

    def __post_init__(self):
        if self.basis % len(WIDTHS) or self.basis < len(WIDTHS):
            raise ValueError(f"basis must be a multiple of {len(WIDTHS)}, got {self.basis}")
        if not 0 < self.tau < 1:
            raise ValueError(f"tau must lie between 0 and 1, got {self.tau}")

    @property
    def centres(self) -> np.ndarray:
        """Centres of the basis functions, f64 [basis]."""
        return np.repeat(np.linspace(0, 1, self.basis // len(WIDTHS)), len(WIDTHS))

    @property
    def widths(self) -> np.ndarray:
        """Widths of the basis functions, f64 [basis]."""
        return np.tile(WIDTHS, self.basis // len(WIDTHS))

    def psi(self, t: Array | np.ndarray) -> Array | np.ndarray:
        """Values of the basis functions.

        Args:
          t: times [...].

        Returns:
          [..., basis], of NumPy or JAX as `t` is.
        """
        xp = np if isinstance(t, np.ndarray) else jnp
        z = (t[..., None] - self.centres) / self.widths
        return xp.exp(-0.5 * z**2) / (self.widths * np.sqrt(2 * np.pi))

    def fit(self, times: np.ndarray) -> np.ndarray:
        """The linear map from rows to coefficients, by ridge regression.

        The fit assumes zeros outside [0, 1], up to half a unit on either side. Without them the
        ends of [0, 1] are fitted badly.

        Args:
          times: f64 [n], times of the rows.

        Returns:
          Kernel f32 [basis, n]: coefficients = kernel @ rows.
        """
        n = len(times)
        around = -0.5 + (np.arange(2 * n) + 0.5) / n  # in [-1/2, 3/2]
        every = np.concatenate([around[around < 0], times, around[around > 1]])
        basis = np.asarray(self.psi(every))
        kernel = np.linalg.solve(basis.T @ basis + RIDGE * np.eye(self.basis), basis.T)
        before = int((around < 0).sum())
        return kernel[:, before : before + n].astype(np.float32)

    @property
    def first(self) -> np.ndarray:
        """The map [basis, L] for a stream's first segment, which takes all of [0, 1]."""
        return self.fit(middles(self.segment_length))

    @property
    def again(self) -> np.ndarray:
        """The map [basis, samples + L] for samples of the old signal and a new segment."""
        new = self.tau + (1 - self.tau) * middles(self.segment_length)
        return self.fit(np.concatenate([self.tau * middles(self.samples), new]))


def middles(n: int) -> np.ndarray:
    """The middles of n equal parts of [0, 1], f64 [n]; these are the times of n rows."""
    return (np.arange(n) + 0.5) / n


@flax.struct.dataclass
class Past:
    """The memory of one layer; the signal is f32, rows have the model's dtype."""

    rows: Array  # [B, L, D] the layer's inputs in the last segment, padding 0
    coefficients: Array  # [B, basis, D] of the signal up to the segment before that
    density: Array  # [B, BINS] mass of attention over time in the last segment, else 0
    rows_seen: Array  # i32 [B] segments read so far


class LongTermMemory(nn.Module):
    """Attention to the continuous past; each query attends to a Gaussian in time.

    Takes query [B, N, H, e], mask bool [B, N] and a `Past`. Returns the values read [B, N, D]; the
    past, whose signal now has the last segment; and the (sum, count) of the Kullback-Leibler loss.
    """

    sizes: Sizes
    signal: Signal

    @nn.compact
    def __call__(
        self, query: Array, mask: Array, past: Past, key: Key | None
    ) -> tuple[Array, Past, Sum]:
        """Applies the module, see the class."""
        s, signal = self.sizes, self.signal
        coefficients = self.write(past, key)
        keys = split_heads(dense(s, s.dim, "key")(coefficients), s.heads)
        values = split_heads(dense(s, s.dim, "value")(coefficients), s.heads)
        logits = jnp.einsum("bnhe,bjhe->bhnj", query, keys) * query.shape[-1] ** -0.5
        weight = lambda name: self.param(name, normal(s.initial), (signal.basis,))
        mean = jax.nn.sigmoid(logits @ weight("mean"))
        variance = jnp.maximum(jax.nn.softplus(logits @ weight("variance")), LEAST_VARIANCE)
        spread = jnp.sqrt(variance[..., None] + signal.widths**2)
        seen = jnp.exp(-0.5 * ((mean[..., None] - signal.centres) / spread) ** 2)
        seen = seen / (spread * np.sqrt(2 * np.pi))
        out = jnp.einsum("bhnj,bjhe->bnhe", seen.astype(values.dtype), values)
        out = dense(s, s.dim, "out", residual_scale(s))(out.reshape(*mask.shape, -1))
        started = past.rows_seen > 0
        counted = (mask & started[:, None])[:, None]
        ratio = variance / signal.prior**2
        kl = jnp.where(counted, 0.5 * (ratio - jnp.log(ratio) - 1), 0.0).sum()
        edges = jnp.linspace(0.0, 1.0, BINS + 1)
        below = jax.scipy.stats.norm.cdf((edges - mean[..., None]) * variance[..., None] ** -0.5)
        density = jnp.where(counted[..., None], jnp.diff(below), 0.0).sum((1, 2))
        density = jax.lax.stop_gradient(density)
        after = dataclasses.replace(past, coefficients=coefficients, density=density)
        out = jnp.where(started[:, None, None], out, 0.0)
        return out, after, (kl, counted.sum() * jnp.float32(s.heads))

    def write(self, past: Past, key: Key | None) -> Array:
        """The coefficients after the last segment is added, f32 [B, basis, D]."""
        s, signal = self.sizes, self.signal
        rows = dropout(past.rows, s.dropout, key)
        gate = nn.Conv(s.dim, (3,), dtype=s.dtype, kernel_init=normal(s.initial), name="gate")(rows)
        rows = rows * jax.nn.sigmoid(gate)
        rows = rows.astype(jnp.float32)
        first = jnp.einsum("jn,bnd->bjd", signal.first, rows)
        old = jnp.einsum("bsj,bjd->bsd", signal.psi(self.sample(past.density)), past.coefficients)
        again = jnp.einsum("jn,bnd->bjd", signal.again, jnp.concatenate([old, rows], 1))
        segments = past.rows_seen[:, None, None]
        return jnp.where(segments > 1, again, jnp.where(segments == 1, first, past.coefficients))

    def sample(self, density: Array) -> Array:
        """Times at which the old signal is read.

        Args:
          density: [B, BINS], mass of attention over time.

        Returns:
          Increasing times [B, samples], at equal steps of the mass. They lie at equal steps of time
          where the mass is zero, or where the signal is not sticky.
        """
        signal = self.signal
        even = jnp.asarray(middles(signal.samples), jnp.float32)
        if not signal.sticky:
            return jnp.broadcast_to(even, (len(density), signal.samples))
        total = density.sum(1, keepdims=True)
        share = jnp.where(total > 0, density / jnp.where(total > 0, total, 1.0), 1.0 / BINS)
        cumulated = jnp.concatenate([jnp.zeros_like(total), jnp.cumsum(share, 1)], 1)
        return jax.vmap(lambda c: jnp.interp(even, c, jnp.linspace(0.0, 1.0, BINS + 1)))(cumulated)


class Block(nn.Module):
    """GPT-2's block, whose attention adds the values read from the long-term memory.

    Takes x [B, N, D], mask bool [B, N] and a `Past`. Returns x and the report: the new past, and
    the (sum, count) of the Kullback-Leibler loss.
    """

    sizes: Sizes
    signal: Signal

    @nn.compact
    def __call__(
        self, x: Array, mask: Array, past: Past, key: Key | None
    ) -> tuple[Array, tuple[Past, Sum]]:
        """Applies the module, see the class."""
        s = self.sizes
        attended, query = SelfAttention(s, name="attn")(norm(s, "ln_1")(x), mask, fold(key, 0))
        attended = dense(s, s.dim, "attn_c_proj", residual_scale(s))(attended)
        memory = LongTermMemory(s, self.signal, name="long_term")
        recalled, past, kl = memory(query, mask, past, fold(key, 3))
        missing = [(0, 0), (0, self.signal.segment_length - x.shape[1]), (0, 0)]
        rows = jnp.pad(jnp.where(mask[..., None], x, 0.0), missing)
        x = x + dropout(attended + recalled, s.dropout, fold(key, 1))
        wide = Feedforward(s, name="mlp")(norm(s, "ln_2")(x))
        x = x + dropout(wide, s.dropout, fold(key, 2))
        return x, (dataclasses.replace(past, rows=rows), kl)


@flax.struct.dataclass
class Remembered:
    """The state."""

    layers: tuple[Past, ...]
    segments: Array  # i32 [B] read so far


def make(sizes: Sizes, signal: Signal) -> SequenceModel:
    """Builds an infinity-former; padding at a segment's end is rows of zeros in the signal."""
    module = GPT2(sizes, Block, (signal,))

    def init(key: Key) -> Params:
        tokens = jnp.zeros((1, 1), jnp.int32)
        return module.init(key, tokens, tokens == 0, init_state(None, 1).layers)["params"]

    def init_state(params: Params, batch_size: int) -> Remembered:
        zeros = lambda *shape, dtype=jnp.float32: jnp.zeros((batch_size, *shape), dtype)
        none = jnp.zeros(batch_size, jnp.int32)
        rows = zeros(signal.segment_length, sizes.dim, dtype=sizes.dtype)
        past = Past(rows, zeros(signal.basis, sizes.dim), zeros(BINS), none)
        return Remembered((past,) * sizes.layers, none)

    def reset(state: Remembered, where: Array) -> Remembered:
        def reset_layer(past: Past) -> Past:
            seen = jnp.where(where, 0, past.rows_seen)
            density = jnp.where(where[:, None], 0.0, past.density)
            return dataclasses.replace(past, rows_seen=seen, density=density)

        layers = tuple(map(reset_layer, state.layers))
        return Remembered(layers, jnp.where(where, 0, state.segments))

    def step(
        params: Params, state: Remembered, tokens: Array, mask: Array, key: Key | None = None
    ) -> tuple[Array, Remembered, Sum]:
        applied = module.apply({"params": params}, tokens, mask, state.layers, key)
        hidden, reports = cast(tuple, applied)
        alive = mask.any(-1)
        keep = lambda new, old: jnp.where(alive.reshape(-1, *[1] * (new.ndim - 1)), new, old)
        layers = []
        for old, (new, _) in zip(state.layers, reports, strict=True):
            new = dataclasses.replace(new, rows_seen=old.rows_seen + 1)
            layers.append(jax.tree.map(keep, new, old))
        losses = zip(*(kl for _, kl in reports), strict=True)
        total, count = (sum(part) / sizes.layers for part in losses)
        after = Remembered(tuple(layers), state.segments + alive)
        return hidden, after, (signal.weight * total, count)

    return SequenceModel(init, init_state, reset, step, tied_logits(sizes))


@dataclasses.dataclass(frozen=True)
class Settings(transformer_xl.Settings):
    """Settings of the model."""

    released = True
    sticky: bool = setting(True, doc="infinity: the past is sampled where attention was")

    def conflicts(self, config: ConfigDict | None = None) -> Iterator[str]:
        """Yields a message for each conflict, see `rmjax.registry.Registry.settings`."""
        yield from super().conflicts(config)
        rows = self.rows(config)
        if rows % 2:
            yield f"{{memory}}: that is {rows} rows (0: a segment's); must be even"


def build(settings: Settings, context: ModelContext) -> SequenceModel:
    """Builds the model, see `rmjax.types.SequenceModel`."""
    n = context.segment_length
    length = settings.memory or n
    signal = Signal(segment_length=n, basis=length, samples=length, sticky=settings.sticky)
    return make(Sizes(**gpt2.size_fields(settings, context)), signal)
