"""Moved to `rmjax.run`."""

from rmjax._moved import forward

_STAGES = ("Preempted", "Run", "Stage", "first_step", "fresh_state", "map_stage", "model_stage")

__getattr__ = forward(
    __name__,
    {"show": "rmjax.run.evaluate", "*": "rmjax.run.training"}
    | dict.fromkeys(_STAGES, "rmjax.run.stages"),
)
