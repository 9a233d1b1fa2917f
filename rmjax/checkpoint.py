"""The old name of `rmjax.io.checkpoint`."""

from rmjax._moved import forward

__getattr__ = forward(__name__, {"*": "rmjax.io.checkpoint"})
