"""A linear layer whose kernel has a row for each output."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.linen.initializers import lecun_normal, zeros
from flax.typing import Initializer

from rmjax.types import Array


class Dense(nn.Module):
    """A linear layer: x @ kernel.T + bias, with kernel [features, in] and bias [features].

    nn.Dense has a kernel [in, features]. For its gradient XLA on a CPU first copies the activations
    into the other order, an eighth of a Transformer layer's time. Initial values are those of
    nn.Dense, transposed: `kernel_init` is called with [in, features].

    Attributes:
      features: width of the output.
      use_bias: whether there is a bias.
      dtype: of the product; None: that of x and the parameters.
      kernel_init: draws the kernel's initial values.
    """

    features: int
    use_bias: bool = True
    dtype: jnp.dtype | None = None
    kernel_init: Initializer = lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [..., in] to [..., features]."""
        kernel = self.param(
            "kernel", lambda key: self.kernel_init(key, (x.shape[-1], self.features), jnp.float32).T
        )
        bias = self.param("bias", zeros, (self.features,), jnp.float32) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = jnp.einsum("...i,oi->...o", x, kernel)
        return y if bias is None else y + bias
