"""Moved to `rmjax.run.environment`."""

from rmjax._moved import forward

__getattr__ = forward(__name__, {"*": "rmjax.run.environment"})
