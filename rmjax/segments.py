"""The old name of `rmjax.data.segments`."""

from rmjax._moved import forward

__getattr__ = forward(__name__, {"*": "rmjax.data.segments"})
