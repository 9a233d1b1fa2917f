"""The gated recurrent unit, with its input projection apart so that it can be hoisted out of a scan."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from rmjax.types import Array, Key, Params


def init_gru(key: Key, inputs: int, hidden: int, timescale: int = 0) -> Params:
    """Parameters of a GRU: {input [inputs, 3h], hidden [h, 3h], bias [3h], hidden_bias [h]}; gates in order r, z, n.

    timescale: how many steps back the state reaches before training; 0: about two, the usual random kernels. Otherwise
    the untrained state is a leaky average of its inputs' tanh, in their own space: update gates keep it for `timescale`
    steps (2 at least) whatever is read (after the chrono initialisation of Tallec & Ollivier 2018), and the candidate
    is tanh of the input (after the identity of Le et al. 2015). Needs inputs == hidden, else ValueError.
    """
    a, b = jax.random.split(key)
    kernel = nn.initializers.lecun_normal()(a, (inputs, 3 * hidden))
    recurrent = jnp.concatenate(
        [nn.initializers.orthogonal()(k, (hidden, hidden)) for k in jax.random.split(b, 3)], 1
    )
    keep = 0.0
    if timescale:
        if inputs != hidden:
            raise ValueError(
                f"timescale wants inputs as wide as the state, got {inputs} and {hidden}"
            )
        gates = slice(2 * hidden)
        kernel = (0.1 * kernel).at[:, 2 * hidden :].set(jnp.eye(hidden))
        recurrent = jnp.zeros_like(recurrent).at[:, gates].set(0.1 * recurrent[:, gates])
        keep = math.log(max(timescale - 1, 1))  # its sigmoid is 1 - 1 / timescale
    return {
        "input": kernel,
        "hidden": recurrent,
        "bias": jnp.zeros(3 * hidden).at[hidden : 2 * hidden].set(keep),
        "hidden_bias": jnp.zeros(hidden),
    }


def gru_input(params: Params, x: Array) -> Array:
    """X [..., inputs] -> the input's part of the three gates [..., 3h]; knows nothing of the state."""
    return x @ params["input"] + params["bias"]


def gru(params: Params, h: Array, gates: Array) -> Array:
    """One step, reset after the product (cuDNN's form): h [..., h], gates = `gru_input(x)` -> new h."""
    return _gated(h, gates, h @ params["hidden"], params["hidden_bias"])


@jax.custom_vjp
def _gated(h: Array, gates: Array, recurrent: Array, bias: Array) -> Array:
    """What a GRU does after its products. Its own gradient, since that of slices is a sum of padded arrays."""
    return _gated_forward(h, gates, recurrent, bias)[0]


def _gated_forward(h, gates, recurrent, bias):
    d = h.shape[-1]
    rz = jax.nn.sigmoid(gates[..., : 2 * d] + recurrent[..., : 2 * d])
    r, z = rz[..., :d], rz[..., d:]
    past = recurrent[..., 2 * d :] + bias
    n = jnp.tanh(gates[..., 2 * d :] + r * past)
    return n + z * (h - n), (h, r, z, n, past)


def _gated_backward(saved, g):
    h, r, z, n, past = saved
    d_n = g * (1.0 - z) * (1.0 - n * n)
    d_past = d_n * r
    d_rz = [d_n * past * r * (1.0 - r), g * (h - n) * z * (1.0 - z)]
    d_gates, d_recurrent = jnp.concatenate([*d_rz, d_n], -1), jnp.concatenate([*d_rz, d_past], -1)
    return g * z, d_gates, d_recurrent, d_past.sum(tuple(range(d_past.ndim - 1)))


_gated.defvjp(_gated_forward, _gated_backward)


def gru_scan(
    params: Params, h: Array, gates: Array, mask: Array, reverse: bool = False
) -> tuple[Array, Array]:
    """H [B, h] through gates [B, N, 3h]; masked items keep h. -> last h [B, h], all h [B, N, h]."""

    def step(h, x):
        g, m = x
        h = jnp.where(m[:, None], gru(params, h, g), h)
        return h, h

    h, hs = jax.lax.scan(step, h, (gates.swapaxes(0, 1), mask.swapaxes(0, 1)), reverse=reverse)
    return h, hs.swapaxes(0, 1)


def init_bigru(key: Key, inputs: int, width: int) -> Params:
    """Parameters of a bidirectional GRU whose two outputs together are `width` wide."""
    if width % 2:
        raise ValueError(f"a bidirectional GRU needs an even width, got {width}")
    a, b = jax.random.split(key)
    return {"forward": init_gru(a, inputs, width // 2), "backward": init_gru(b, inputs, width // 2)}


def bigru(params: Params, x: Array, mask: Array) -> tuple[Array, Array]:
    """X [R, N, d], mask [R, N] -> outputs [R, N, width], last states of both directions [R, width]."""
    runs = []
    for name in ("forward", "backward"):
        p = params[name]
        h = jnp.zeros((x.shape[0], p["hidden_bias"].shape[0]), x.dtype)
        runs.append(gru_scan(p, h, gru_input(p, x), mask, reverse=name == "backward"))
    (last_f, all_f), (last_b, all_b) = runs
    return jnp.concatenate([all_f, all_b], -1), jnp.concatenate([last_f, last_b], -1)
