"""The gated recurrent unit, with its input projection apart so that it can be hoisted out of a scan."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from rmjax.types import Array, Key, Params


def init_gru(key: Key, inputs: int, hidden: int, timescale: int = 0) -> Params:
    """Parameters of a GRU: {input [inputs, 3h], hidden [h, 3h], bias [3h], hidden_bias [h]}; gates in order r, z, n.

    timescale: how many steps back the state should reach before training: unit i begins by keeping its state for
    1 to timescale steps, evenly over orders of magnitude (after the chrono initialisation of Tallec & Ollivier 2018).
    0: zero biases, about two steps.
    Where inputs == hidden the candidate's input kernel is the identity (as in Le et al. 2015): an untrained state is a
    leaky average in the space of what it reads.
    """
    a, b, c = jax.random.split(key, 3)
    hidden_kernels = [nn.initializers.orthogonal()(k, (hidden, hidden)) for k in jax.random.split(b, 3)]
    keep = jax.random.uniform(c, (hidden,), maxval=math.log(max(timescale, 1)))
    kernel = nn.initializers.lecun_normal()(a, (inputs, 3 * hidden))
    if inputs == hidden:
        kernel = kernel.at[:, 2 * hidden :].set(jnp.eye(hidden))
    return {
        "input": kernel,
        "hidden": jnp.concatenate(hidden_kernels, 1),
        "bias": jnp.zeros(3 * hidden).at[hidden : 2 * hidden].set(keep),
        "hidden_bias": jnp.zeros(hidden),
    }


def gru_input(params: Params, x: Array) -> Array:
    """x [..., inputs] -> the input's part of the three gates [..., 3h]; knows nothing of the state."""
    return x @ params["input"] + params["bias"]


def gru(params: Params, h: Array, gates: Array) -> Array:
    """One step, reset after the product (cuDNN's form): h [..., h], gates = `gru_input(x)` -> new h."""
    recurrent = h @ params["hidden"]
    d = h.shape[-1]
    rz = jax.nn.sigmoid(gates[..., : 2 * d] + recurrent[..., : 2 * d])
    r, z = rz[..., :d], rz[..., d:]
    n = jnp.tanh(gates[..., 2 * d :] + r * (recurrent[..., 2 * d :] + params["hidden_bias"]))
    return n + z * (h - n)


def gru_scan(params: Params, h: Array, gates: Array, mask: Array, reverse: bool = False) -> tuple[Array, Array]:
    """h [B, h] through gates [B, N, 3h]; masked items keep h. -> last h [B, h], all h [B, N, h]."""

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
    """x [R, N, d], mask [R, N] -> outputs [R, N, width], last states of both directions [R, width]."""
    runs = []
    for name in ("forward", "backward"):
        p = params[name]
        h = jnp.zeros((x.shape[0], p["hidden_bias"].shape[0]), x.dtype)
        runs.append(gru_scan(p, h, gru_input(p, x), mask, reverse=name == "backward"))
    (last_f, all_f), (last_b, all_b) = runs
    return jnp.concatenate([all_f, all_b], -1), jnp.concatenate([last_f, last_b], -1)
