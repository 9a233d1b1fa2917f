"""The gated recurrent unit (GRU), and the long short-term memory (LSTM).

The input projection is a function of its own, so that it can be computed before a scan.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from rmjax.types import Array, Key, Params


def init_gru(key: Key, inputs: int, hidden: int, timescale: int = 0) -> Params:
    """Draws the parameters of a GRU, whose gates are in the order r, z, n.

    With a timescale the untrained state is a leaky average of tanh(input), in the input's space.
    Update gates keep it for `timescale` steps (2 at least) at any input, after the chrono
    initialisation of Tallec & Ollivier 2018. The candidate is tanh of the input, after the identity
    initialisation of Le et al. 2015.

    Args:
      key: of the draws.
      inputs: width of the input.
      hidden: h, width of the state.
      timescale: steps that the untrained state reaches back; 0: about two, the usual random
        kernels.

    Returns:
      {input: [inputs, 3h], hidden: [h, 3h], bias: [3h], hidden_bias: [h]}.

    Raises:
      ValueError: there is a timescale, and inputs and hidden differ.
    """
    a, b = jax.random.split(key)
    kernel = nn.initializers.lecun_normal()(a, (inputs, 3 * hidden))
    recurrent = jnp.concatenate(
        [nn.initializers.orthogonal()(k, (hidden, hidden)) for k in jax.random.split(b, 3)], 1
    )
    keep = 0.0
    if timescale:
        if inputs != hidden:
            raise ValueError(f"timescale needs inputs == hidden, got {inputs} and {hidden}")
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
    """The part of the gates that depends on the input alone.

    Args:
      params: from `init_gru`.
      x: [..., inputs].

    Returns:
      [..., 3h].
    """
    return x @ params["input"] + params["bias"]


def gru(params: Params, h: Array, gates: Array) -> Array:
    """One step; the reset gate acts after the product, as in cuDNN.

    Args:
      params: from `init_gru`.
      h: state [..., h].
      gates: from `gru_input`, [..., 3h].

    Returns:
      The new state [..., h].
    """
    return _gated(h, gates, h @ params["hidden"], params["hidden_bias"])


@jax.custom_vjp
def _gated(h: Array, gates: Array, recurrent: Array, bias: Array) -> Array:
    """The part of a GRU step after the products.

    It defines its gradient, since the automatic gradient of slices is a sum of padded arrays.
    """
    return _gated_forward(h, gates, recurrent, bias)[0]


def _gated_forward(
    h: Array, gates: Array, recurrent: Array, bias: Array
) -> tuple[Array, tuple[Array, ...]]:
    d = h.shape[-1]
    rz = jax.nn.sigmoid(gates[..., : 2 * d] + recurrent[..., : 2 * d])
    r, z = rz[..., :d], rz[..., d:]
    past = recurrent[..., 2 * d :] + bias
    n = jnp.tanh(gates[..., 2 * d :] + r * past)
    return n + z * (h - n), (h, r, z, n, past)


def _gated_backward(saved: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
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
    """Steps through the items of a row; masked items keep the state.

    Args:
      params: from `init_gru`.
      h: state [B, h].
      gates: from `gru_input`, [B, N, 3h].
      mask: bool [B, N].
      reverse: goes from the last item to the first.

    Returns:
      The last state [B, h], and the states after each item [B, N, h].
    """

    def step(h: Array, x: tuple[Array, Array]) -> tuple[Array, Array]:
        g, m = x
        h = jnp.where(m[:, None], gru(params, h, g), h)
        return h, h

    h, hs = jax.lax.scan(step, h, (gates.swapaxes(0, 1), mask.swapaxes(0, 1)), reverse=reverse)
    return h, hs.swapaxes(0, 1)


def init_bigru(key: Key, inputs: int, width: int) -> Params:
    """Draws the parameters of a bidirectional GRU.

    Args:
      key: of the draws.
      inputs: width of the input.
      width: of both outputs together.

    Returns:
      {forward, backward}: parameters of a GRU for each direction.

    Raises:
      ValueError: the width is odd.
    """
    if width % 2:
        raise ValueError(f"a bidirectional GRU needs an even width, got {width}")
    a, b = jax.random.split(key)
    return {"forward": init_gru(a, inputs, width // 2), "backward": init_gru(b, inputs, width // 2)}


def bigru(params: Params, x: Array, mask: Array) -> tuple[Array, Array]:
    """Reads rows in both directions.

    Args:
      params: from `init_bigru`.
      x: [R, N, d].
      mask: bool [R, N].

    Returns:
      Outputs [R, N, width], and the last states of both directions [R, width].
    """
    runs = []
    for name in ("forward", "backward"):
        p = params[name]
        h = jnp.zeros((x.shape[0], p["hidden_bias"].shape[0]), x.dtype)
        runs.append(gru_scan(p, h, gru_input(p, x), mask, reverse=name == "backward"))
    (last_f, all_f), (last_b, all_b) = runs
    return jnp.concatenate([all_f, all_b], -1), jnp.concatenate([last_f, last_b], -1)


def init_lstm(key: Key, inputs: int, hidden: int) -> Params:
    """Draws the parameters of an LSTM, whose gates are in the order i, f, g, o.

    The forget gate f has a bias of 1 before training (Jozefowicz et al. 2015).

    Args:
      key: of the draws.
      inputs: width of the input.
      hidden: h, width of the state.

    Returns:
      {input: [inputs, 4h], hidden: [h, 4h], bias: [4h]}.
    """
    a, b = jax.random.split(key)
    recurrent = [nn.initializers.orthogonal()(k, (hidden, hidden)) for k in jax.random.split(b, 4)]
    return {
        "input": nn.initializers.lecun_normal()(a, (inputs, 4 * hidden)),
        "hidden": jnp.concatenate(recurrent, 1),
        "bias": jnp.zeros(4 * hidden).at[hidden : 2 * hidden].set(1.0),
    }


def lstm_input(params: Params, x: Array) -> Array:
    """The part of the gates that depends on the input alone.

    Args:
      params: from `init_lstm`.
      x: [..., inputs].

    Returns:
      [..., 4h].
    """
    return x @ params["input"] + params["bias"]


def lstm(params: Params, h: Array, c: Array, gates: Array) -> tuple[Array, Array]:
    """One step (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000).

    Args:
      params: from `init_lstm`.
      h: output of the last step [..., h].
      c: cell state [..., h].
      gates: from `lstm_input`, [..., 4h].

    Returns:
      The new h and c, [..., h] each.
    """
    i, f, g, o = jnp.split(gates + h @ params["hidden"], 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c
