"""A linear layer whose kernel is stored by rows of outputs."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.linen.initializers import lecun_normal, zeros
from flax.typing import Initializer

from rmjax.types import Array


class Dense(nn.Module):
    """x [..., in] -> x @ kernel.T + bias [..., features]; kernel [features, in], bias [features].

    For the gradient of a kernel [in, features], as nn.Dense has it, XLA on a CPU first copies the activations into the
    other order: an eighth of a transformer layer's time. Initial values are those of nn.Dense, transposed:
    `kernel_init` is called with [in, features].
    """

    features: int
    use_bias: bool = True
    dtype: jnp.dtype | None = None
    kernel_init: Initializer = lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param(
            "kernel", lambda key: self.kernel_init(key, (x.shape[-1], self.features), jnp.float32).T
        )
        bias = self.param("bias", zeros, (self.features,), jnp.float32) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = jnp.einsum("...i,oi->...o", x, kernel)
        return y if bias is None else y + bias
