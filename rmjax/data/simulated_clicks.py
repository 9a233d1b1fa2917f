"""Moved to `rmjax.data.clicks.simulated`."""

from rmjax._moved import forward

__getattr__ = forward(__name__, {"*": "rmjax.data.clicks.simulated"})
