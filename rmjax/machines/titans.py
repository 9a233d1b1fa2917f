"""Titans' neural long-term memory (Behrouz et al. 2025, section 3): the state is a small network.

The network M maps keys to values. An item takes a step of gradient descent on the network's error,
with momentum S and forgetting:

    S_t = eta_t S_(t-1) - theta_t grad |M_W(k_t) - v_t|^2,    W_t = (1 - alpha_t) W_(t-1) + S_t

As in section 3.2 of the paper, the gradients of a chunk are those at the weights before the chunk.
W and S after the chunk are then linear in W and S before it and in the gradients. An associative
scan over the gates finds the factors. The two sums of gradients come from two pullbacks, so the
gradient of a single item is never stored.

The network has a residual connection around a norm, so its values are bounded. A plain network
diverged where an item came many times in a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal, normal

from rmjax.layers import norms
from rmjax.machines import keyvalue
from rmjax.registry import above, at_least, setting
from rmjax.types import Array, Context, Key, MemoryMachine, Params

Weights = tuple[Array, ...]  # one matrix a layer, f32 [B, in, out]


@flax.struct.dataclass
class Network:
    """The networks of B streams."""

    weights: Weights  # f32 [B, in, out] of each layer, W
    momentum: Weights  # f32 [B, in, out] of each layer, S


class Factors(NamedTuple):
    """The factors of a chunk, all f32 [..., n]; the first three are used at the first item.

    From any item on, W becomes keep W + push S, and S becomes stay S, besides the gradients.
    """

    keep: Array
    push: Array
    stay: Array
    to_weights: Array  # of an item's gradient in W after the chunk
    to_momentum: Array  # of an item's gradient in S after the chunk


@dataclasses.dataclass(frozen=True)
class Settings(keyvalue.Settings):
    """Settings of the neural memory.

    With two layers the state has 4 expand d^2 floats, half of them momentum.
    """

    depth: int = setting(2, at_least(1), "titans: layers of the network; 1: a matrix")
    expand: int = setting(1, at_least(1), "titans: width of hidden layers, times machine.dim")
    rate: float = setting(1.0, above(0), "titans: largest step of gradient descent, theta")
    residual: bool = setting(True, doc="titans: the network is x + norm(layers(x))")

    @property
    def ignores(self) -> dict[str, str]:
        """Keys that such a run does not read, see `rmjax.registry.Registry.ignored_by`."""
        return super().ignores | ({"machine.expand": "depth"} if self.depth == 1 else {})


def make(num_items: int, settings: Settings, context: Context) -> MemoryMachine:
    """Builds the machine, see `rmjax.types.MemoryMachine`.

    By default hidden layers are as wide as the items. `expand` = 4 is the usual width of such a
    network, and makes the state four times as large.
    """
    dim = settings.dim
    widths = [dim, *[settings.expand * dim] * (settings.depth - 1), dim]
    forget = 1 / keyvalue.timescale(settings.timescale, context)

    def init(key: Key) -> Params:
        first, *keys = jax.random.split(key, settings.depth + 1)
        shapes = zip(keys, widths[:-1], widths[1:], strict=True)
        return {
            "gates": 0.1 * lecun_normal()(first, (dim, 3)),
            "bias": jax.scipy.special.logit(jnp.array([0.1, 0.5, forget])),  # theta, eta, alpha
            # Keys have unit length, so every layer's outputs have entries of about unit variance.
            "weights": [normal(1.0)(k, shape) for k, *shape in shapes],
        }

    def init_state(params: Params, batch_size: int) -> Network:
        spread = lambda w: jnp.broadcast_to(w, (batch_size, *w.shape))
        weights = jax.tree.map(spread, tuple(params["weights"]))
        return Network(weights, jax.tree.map(jnp.zeros_like, weights))

    def gates(params: Params, x: Array, mask: Array) -> Factors:
        opened = jax.nn.sigmoid(x @ params["gates"] + params["bias"])
        theta, eta, alpha = jnp.moveaxis(opened, -1, 0)
        return factors(settings.rate * theta, eta, alpha, mask)

    network = around if settings.residual else recall
    functions = init, init_state, gates, partial(write, network), partial(look_up, network)
    rule = keyvalue.Rule(1, *functions)
    return keyvalue.make(num_items, settings, context, rule)


def factors(theta: Array, eta: Array, alpha: Array, mask: Array) -> Factors:
    """The factors of chunks, from their gates.

    An item maps (W, S) to (W, S) times [[1 - alpha, eta], [0, eta]], minus theta times its gradient
    in both. A masked item is the identity.

    Args:
      theta: f32 [..., n], steps.
      eta: f32 [..., n], share of the momentum that stays.
      alpha: f32 [..., n], share of the weights that is forgotten.
      mask: bool [..., n].

    Returns:
      The factors.
    """
    keep, push = jnp.where(mask, 1 - alpha, 1.0), jnp.where(mask, eta, 0.0)
    stay = jnp.where(mask, eta, 1.0)

    def product(later: tuple[Array, ...], item: tuple[Array, ...]) -> tuple[Array, ...]:
        (p, q, r), (keep, push, stay) = later, item
        return p * keep, p * push + q * stay, r * stay

    keep, push, stay = jax.lax.associative_scan(
        product, (keep, push, stay), reverse=True, axis=mask.ndim - 1
    )

    def after(x: Array, last: float) -> Array:
        return jnp.concatenate([x[..., 1:], jnp.full_like(x[..., :1], last)], -1)

    theta = jnp.where(mask, theta, 0.0)
    to_weights = theta * (after(keep, 1.0) + after(push, 0.0))
    return Factors(keep, push, stay, to_weights, theta * after(stay, 1.0))


def recall(weights: Weights, x: Array) -> Array:
    """The layers of the network: f32 [B, n, e] to f32 [B, n, e].

    The factor keeps the length of hidden vectors, so good steps do not depend on the width.
    """
    *hidden, last = weights
    for w in hidden:
        x = jax.nn.gelu(x @ w) * (2 / w.shape[-1]) ** 0.5
    return x @ last


def around(weights: Weights, x: Array) -> Array:
    """The network with a residual connection: x + norm(layers).

    The epsilon of the norm is 1. Weights that are nearly forgotten then have gradients of their
    own size, and large weights have values of length sqrt(e).
    """
    return x + norms.layer(recall(weights, x), epsilon=1.0)


def write(
    network: Callable[[Weights, Array], Array], state: Network, k: Array, v: Array, gates: Factors
) -> Network:
    """Writes a chunk.

    Args:
      network: `recall` or `around`.
      state: before the chunk.
      k: f32 [B, n, 1, e], of unit length.
      v: f32 [B, n, 1, e].
      gates: factors f32 [B, n].

    Returns:
      The state after the chunk.
    """
    output, pullback = jax.vjp(lambda weights: network(weights, k[:, :, 0]), state.weights)
    slope = 2 * (output - v[:, :, 0])  # of the squared error
    (for_weights,) = pullback(gates.to_weights[..., None] * slope)
    (for_momentum,) = pullback(gates.to_momentum[..., None] * slope)
    keep, push, stay = (x[:, 0, None, None] for x in gates[:3])
    of_weights = lambda w, s, g: keep * w + push * s - g
    return Network(
        jax.tree.map(of_weights, state.weights, state.momentum, for_weights),
        jax.tree.map(lambda s, g: stay * s - g, state.momentum, for_momentum),
    )


def look_up(network: Callable[[Weights, Array], Array], state: Network, q: Array) -> Array:
    """The values M_W(q) under keys q, f32 [B, Q, 1, e]."""
    return network(state.weights, q[:, :, 0])[:, :, None]
