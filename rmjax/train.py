"""The old name of `rmjax.run`."""

from rmjax._moved import forward

__getattr__ = forward(__name__, {"show": "rmjax.run.evaluate", "*": "rmjax.run.training"})
