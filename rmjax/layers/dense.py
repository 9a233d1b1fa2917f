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

    XLA's products on a CPU take the gradient of this kernel as it comes; that of nn.Dense's [in, features] costs them
    transposed copies of whole activations, an eighth of a transformer layer. Elsewhere the two are alike.
    `kernel_init` is called with [in, features], as nn.Dense calls it.
    """

    features: int
    use_bias: bool = True
    dtype: jnp.dtype | None = None
    kernel_init: Initializer = lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", lambda key: self.kernel_init(key, (x.shape[-1], self.features)).T)
        bias = self.param("bias", zeros, (self.features,)) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = jnp.einsum("...i,oi->...o", x, kernel)
        return y if bias is None else y + bias
