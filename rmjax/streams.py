"""The old name of `rmjax.serve.store`."""

from rmjax._moved import forward

__getattr__ = forward(__name__, {"*": "rmjax.serve.store"})
