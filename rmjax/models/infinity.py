"""The infinity-former (Martins et al. 2021) on GPT-2, long-term memory only, as in Memoria's experiments.

The past is a continuous signal x(t) = B^T psi(t) on [0, 1]: coefficients B of Gaussian basis functions, fitted by ridge
regression. A new segment goes to (tau, 1] and what there was shrinks to (0, tau], so the state never grows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.initializers import normal

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
    split_heads,
    tied_logits,
)
from rmjax.registry import setting
from rmjax.types import Array, Key, ModelContext, Params, SequenceModel, Sum

WIDTHS = (0.005, 0.01)  # of the basis functions
RIDGE = 0.5
BINS = 128  # of the histogram of where attention went
LEAST_VARIANCE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signal:
    """Attributes:
    segment_length: L, rows of a segment.
    basis: how many Gaussians.
    samples: where the old signal is read when it is fitted anew.
    tau: the share of [0, 1] that it keeps.
    sticky: samples lie where attention went, at equal steps of its mass; otherwise at equal steps of time.
    prior: sigma_0 of the Kullback-Leibler term. weight: of that term.
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
        """f64 [basis]"""
        return np.repeat(np.linspace(0, 1, self.basis // len(WIDTHS)), len(WIDTHS))

    @property
    def widths(self) -> np.ndarray:
        """f64 [basis]"""
        return np.tile(WIDTHS, self.basis // len(WIDTHS))

    def psi(self, t: Any) -> Any:
        """Basis functions at times [...] -> [..., basis]."""
        xp = np if isinstance(t, np.ndarray) else jnp
        z = (t[..., None] - self.centres) / self.widths
        return xp.exp(-0.5 * z**2) / (self.widths * np.sqrt(2 * np.pi))

    def fit(self, times: np.ndarray) -> np.ndarray:
        """Kernel f32 [basis, n] that takes rows seen at `times` f64 [n] to coefficients. As far again on either side
        the signal is held to be zero; without that the ends of [0, 1] are fitted badly.
        """
        n = len(times)
        around = -0.5 + (np.arange(2 * n) + 0.5) / n  # of [-1/2, 3/2]
        every = np.concatenate([around[around < 0], times, around[around > 1]])
        basis = self.psi(every)
        kernel = np.linalg.solve(basis.T @ basis + RIDGE * np.eye(self.basis), basis.T)
        before = int((around < 0).sum())
        return kernel[:, before : before + n].astype(np.float32)

    @property
    def first(self) -> np.ndarray:
        """[basis, L]: of a first segment, over all of [0, 1]."""
        return self.fit(middles(self.segment_length))

    @property
    def again(self) -> np.ndarray:
        """[basis, samples + L]: of the old signal's samples and a new segment."""
        new = self.tau + (1 - self.tau) * middles(self.segment_length)
        return self.fit(np.concatenate([self.tau * middles(self.samples), new]))


def middles(n: int) -> np.ndarray:
    """f64 [n], of equal parts of [0, 1]: where n rows lie."""
    return (np.arange(n) + 0.5) / n


@flax.struct.dataclass
class Past:
    """What one layer remembers; the signal is f32, rows are of the model's dtype."""

    rows: Array  # [B, L, D], its inputs in the last segment, padding 0
    coefficients: Array  # [B, basis, D] of the signal up to the segment before that
    density: Array  # [B, BINS] where its attention went in the last segment, 0 if it did not look
    rows_seen: Array  # i32 [B] segments read so far


class LongTermMemory(nn.Module):
    """query [B, N, H, e], mask bool [B, N], Past -> [B, N, D], the past with the last segment in its signal, KL sum."""

    sizes: Sizes
    signal: Signal

    @nn.compact
    def __call__(
        self, query: Array, mask: Array, past: Past, key: Key | None
    ) -> tuple[Array, Past, Sum]:
        s, signal = self.sizes, self.signal
        coefficients = self.write(past, key)
        keys = split_heads(dense(s, s.dim, "key")(coefficients), s.heads)
        values = split_heads(dense(s, s.dim, "value")(coefficients), s.heads)
        logits = jnp.einsum("bnhe,bjhe->bhnj", query, keys) * query.shape[-1] ** -0.5
        weight = lambda name: self.param(name, normal(s.initial), (signal.basis,))
        mean = jax.nn.sigmoid(logits @ weight("mean"))
        variance = jnp.maximum(jax.nn.softplus(logits @ weight("variance")), LEAST_VARIANCE)
        spread = jnp.sqrt(variance[..., None] + signal.widths**2)
        seen = jnp.exp(-0.5 * ((mean[..., None] - signal.centres) / spread) ** 2) / (
            spread * np.sqrt(2 * np.pi)
        )
        out = jnp.einsum("bhnj,bjhe->bnhe", seen.astype(values.dtype), values).reshape(
            *mask.shape, -1
        )
        out = dense(s, s.dim, "out", residual_scale(s))(out)
        there = past.rows_seen > 0
        counted = (mask & there[:, None])[:, None]
        ratio = variance / signal.prior**2
        kl = jnp.where(counted, 0.5 * (ratio - jnp.log(ratio) - 1), 0.0).sum()
        edges = jnp.linspace(0.0, 1.0, BINS + 1)
        below = jax.scipy.stats.norm.cdf((edges - mean[..., None]) * variance[..., None] ** -0.5)
        density = jnp.where(counted[..., None], jnp.diff(below), 0.0).sum((1, 2))
        after = past.replace(coefficients=coefficients, density=jax.lax.stop_gradient(density))  # type: ignore[attr-defined]
        return (
            jnp.where(there[:, None, None], out, 0.0),
            after,
            (kl, counted.sum() * jnp.float32(s.heads)),
        )

    def write(self, past: Past, key: Key | None) -> Array:
        """The coefficients with the last segment in them."""
        s, signal = self.sizes, self.signal
        rows = dropout(past.rows, s.dropout, key)
        gate = nn.Conv(s.dim, (3,), dtype=s.dtype, kernel_init=normal(s.initial), name="gate")(rows)
        rows = rows * jax.nn.sigmoid(gate)
        rows = rows.astype(jnp.float32)
        first = jnp.einsum("jn,bnd->bjd", signal.first, rows)
        old = jnp.einsum("bsj,bjd->bsd", signal.psi(self.sample(past.density)), past.coefficients)
        again = jnp.einsum("jn,bnd->bjd", signal.again, jnp.concatenate([old, rows], 1))
        wide = past.rows_seen[:, None, None]
        return jnp.where(wide > 1, again, jnp.where(wide == 1, first, past.coefficients))

    def sample(self, density: Array) -> Array:
        """Times [B, samples] at equal steps of attention's mass, rising; without any, or not sticky, of time."""
        signal = self.signal
        even = jnp.asarray(middles(signal.samples), jnp.float32)
        if not signal.sticky:
            return jnp.broadcast_to(even, (len(density), signal.samples))
        total = density.sum(1, keepdims=True)
        share = jnp.where(total > 0, density / jnp.where(total > 0, total, 1.0), 1.0 / BINS)
        cumulated = jnp.concatenate([jnp.zeros_like(total), jnp.cumsum(share, 1)], 1)
        return jax.vmap(lambda c: jnp.interp(even, c, jnp.linspace(0.0, 1.0, BINS + 1)))(cumulated)


class Block(nn.Module):
    """GPT-2's, whose attention sublayer adds what it reads from the long-term memory; tells its new past and the KL."""

    sizes: Sizes
    signal: Signal

    @nn.compact
    def __call__(self, x: Array, mask: Array, past: Past, key: Key | None) -> tuple[Array, Any]:
        s = self.sizes
        attended, query = SelfAttention(s, name="attn")(norm(s, "ln_1")(x), mask, fold(key, 0))
        attended = dense(s, s.dim, "attn_c_proj", residual_scale(s))(attended)
        recalled, past, kl = LongTermMemory(s, self.signal, name="long_term")(
            query, mask, past, fold(key, 3)
        )
        missing = [(0, 0), (0, self.signal.segment_length - x.shape[1]), (0, 0)]
        after = past.replace(rows=jnp.pad(jnp.where(mask[..., None], x, 0.0), missing))  # type: ignore[attr-defined]
        x = x + dropout(attended + recalled, s.dropout, fold(key, 1))
        return x + dropout(
            Feedforward(s, name="mlp")(norm(s, "ln_2")(x)), s.dropout, fold(key, 2)
        ), (after, kl)


@flax.struct.dataclass
class Remembered:
    layers: tuple[Past, ...]
    segments: Array  # i32 [B] read so far


def make(sizes: Sizes, signal: Signal) -> SequenceModel:
    """Padding at a segment's end counts as rows of zeros in the signal."""
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
        layers = tuple(
            p.replace(
                rows_seen=jnp.where(where, 0, p.rows_seen),
                density=jnp.where(where[:, None], 0.0, p.density),
            )  # type: ignore[attr-defined]
            for p in state.layers
        )
        return Remembered(layers, jnp.where(where, 0, state.segments))

    def step(params: Params, state: Remembered, tokens: Array, mask: Array, key: Key | None = None):
        hidden, told = cast(
            tuple, module.apply({"params": params}, tokens, mask, state.layers, key)
        )
        alive = mask.any(-1)
        layers = []
        for old, (new, _) in zip(state.layers, told, strict=True):
            new = new.replace(rows_seen=old.rows_seen + 1)
            keep = lambda n, o: jnp.where(alive.reshape(-1, *[1] * (n.ndim - 1)), n, o)
            layers.append(jax.tree.map(keep, new, old))
        total, count = (
            sum(part) / sizes.layers for part in zip(*(kl for _, kl in told), strict=True)
        )
        return (
            hidden,
            Remembered(tuple(layers), state.segments + alive),
            (signal.weight * total, count),
        )

    return SequenceModel(init, init_state, reset, step, tied_logits(sizes))


@dataclasses.dataclass(frozen=True)
class Settings(transformer_xl.Settings):
    released = True
    sticky: bool = setting(True, doc="infinity: the past is sampled where attention went")

    def conflicts(self, config: Any = None) -> Iterator[str]:
        yield from super().conflicts(config)
        if self.rows(config) % 2:
            yield f"{{memory}}: that is {self.rows(config)} rows (0: a segment's); must be even"


def build(settings: Settings, context: ModelContext) -> SequenceModel:
    """The model of a run's settings."""
    n = context.segment_length
    length = settings.memory or n
    signal = Signal(segment_length=n, basis=length, samples=length, sticky=settings.sticky)
    return make(Sizes(**gpt2.size_fields(settings, context)), signal)
