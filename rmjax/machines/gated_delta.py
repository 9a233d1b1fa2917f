"""The gated delta rule as a memory (Yang et al. 2024, "Gated Delta Networks").

A matrix maps keys to values. An item first removes what the matrix holds under the item's key:

    S_t = a_t S_(t-1) (I - b_t k_t k_t^T) + b_t v_t k_t^T

The items of a chunk are written at once. With g_t = a_1 ... a_t the rule becomes
S_t = g_t S_0 + sum_(i<=t) (g_t / g_i) u_i k_i^T. The corrections u solve a triangular system, which
is the WY form of section 3.3 of the paper:

    u_t = b_t (v_t - g_t S_0 k_t - sum_(i<t) (g_t / g_i) (k_i . k_t) u_i)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.machines import keyvalue
from rmjax.registry import at_least, setting
from rmjax.types import Array, Context, Key, MemoryMachine, Params

_Gates = tuple[Array, Array]  # log a_t and b_t, both f32 [B, n, H]


@dataclasses.dataclass(frozen=True)
class Settings(keyvalue.Settings):
    """Settings of the gated delta rule. The state has H matrices of (d / H) x (d / H)."""

    heads: int = setting(4, at_least(1), "attention heads; divides machine.dim")

    def conflicts(self, config: object = None) -> Iterator[str]:
        """Yields a message for each contradiction, see `rmjax.registry.Registry.settings`."""
        if self.dim % self.heads:
            yield "{heads} must divide {dim}"


def make(num_items: int, settings: Settings, context: Context) -> MemoryMachine:
    """Builds the machine, see `rmjax.types.MemoryMachine`."""
    dim, heads = settings.dim, settings.heads
    width = dim // heads
    steps = keyvalue.timescale(settings.timescale, context)

    def init(key: Key) -> Params:
        # Before training -log a is softplus of the bias, 1 / steps, at any item; b is a half.
        decay = jnp.full(heads, math.log(math.expm1(1 / steps)))
        return {
            "gates": 0.1 * lecun_normal()(key, (dim, 2 * heads)),
            "bias": jnp.concatenate([decay, jnp.zeros(heads)]),
            "rate": jnp.zeros(heads),  # A
        }

    def init_state(params: Params, batch_size: int) -> Array:
        return jnp.zeros((batch_size, heads, width, width))  # S, from keys (last axis) to values

    def gates(params: Params, x: Array, mask: Array) -> _Gates:
        decay, take = jnp.split(x @ params["gates"] + params["bias"], 2, -1)
        log_a = -jnp.exp(params["rate"]) * jax.nn.softplus(decay)
        mask = mask[..., None]
        return jnp.where(mask, log_a, 0.0), jnp.where(mask, jax.nn.sigmoid(take), 0.0)

    rule = keyvalue.Rule(heads, init, init_state, gates, write, look_up)
    return keyvalue.make(num_items, settings, context, rule)


def write(state: Array, k: Array, v: Array, gates: _Gates) -> Array:
    """Writes a chunk in the WY form.

    Args:
      state: f32 [B, H, e, e], S_0.
      k: f32 [B, n, H, e], of unit length.
      v: f32 [B, n, H, e].
      gates: log a_t and b_t, f32 [B, n, H]. Both are zero at padding, which then is the identity.

    Returns:
      f32 [B, H, e, e], S_n.
    """
    k, v, log_a, b = (x.swapaxes(1, 2) for x in (k, v, *gates))  # [B, H, n, ...]
    log_g = jnp.cumsum(log_a, -1)
    earlier = jnp.tri(k.shape[-2], k=-1, dtype=bool)  # [t, i], i < t
    # The mask stands inside of exp, which would overflow at later items.
    ratio = jnp.exp(jnp.where(earlier, log_g[..., :, None] - log_g[..., None, :], 0.0))
    system = jnp.where(earlier, b[..., None] * ratio * (k @ k.mT), 0.0)
    held = jnp.exp(log_g)[..., None] * (k @ state.mT)  # g_t S_0 k_t
    u = jax.scipy.linalg.solve_triangular(
        system, b[..., None] * (v - held), lower=True, unit_diagonal=True
    )
    left = jnp.exp(log_g[..., -1:] - log_g)[..., None]  # g_n / g_i
    return jnp.exp(log_g[..., -1])[..., None, None] * state + (left * u).mT @ k


def look_up(state: Array, q: Array) -> Array:
    """The values S q under keys q, f32 [B, Q, H, e]."""
    return jnp.einsum("bhvk,bqhk->bqhv", state, q)
