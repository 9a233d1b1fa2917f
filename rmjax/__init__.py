"""rmjax: reasoning after memorizing.

A machine compresses a stream of any length into a memory of fixed size. Questions are then answered
from the memory alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rmjax.data.clicks.table import open_table
    from rmjax.data.segments import segment
    from rmjax.data.source import Description, Questions, Source
    from rmjax.machines import current_memory, feed, make, memorize, open_stream
    from rmjax.registry import (
        at_least,
        register_logger,
        register_machine,
        register_metric,
        register_schedule,
        register_source,
        setting,
    )
    from rmjax.run.training import fit
    from rmjax.serve.model import Model, open_model
    from rmjax.types import (
        Batch,
        Context,
        Logger,
        LoggerContext,
        MemoryMachine,
        SegmentEncoder,
        Task,
    )

__version__ = "0.1.0"

# {public name: module}. A name is imported at its first use, so that `import rmjax` is fast.
_PUBLIC = {
    "Batch": "rmjax.types",
    "Context": "rmjax.types",
    "Description": "rmjax.data.source",
    "Logger": "rmjax.types",
    "LoggerContext": "rmjax.types",
    "MemoryMachine": "rmjax.types",
    "Model": "rmjax.serve.model",
    "Questions": "rmjax.data.source",
    "SegmentEncoder": "rmjax.types",
    "Source": "rmjax.data.source",
    "Task": "rmjax.types",
    "at_least": "rmjax.registry",
    "current_memory": "rmjax.machines",
    "feed": "rmjax.machines",
    "fit": "rmjax.run.training",
    "make": "rmjax.machines",
    "memorize": "rmjax.machines",
    "open_model": "rmjax.serve.model",
    "open_stream": "rmjax.machines",
    "open_table": "rmjax.data.clicks.table",
    "register_logger": "rmjax.registry",
    "register_machine": "rmjax.registry",
    "register_metric": "rmjax.registry",
    "register_schedule": "rmjax.registry",
    "register_source": "rmjax.registry",
    "segment": "rmjax.data.segments",
    "setting": "rmjax.registry",
}
__all__ = [
    "Batch",
    "Context",
    "Description",
    "Logger",
    "LoggerContext",
    "MemoryMachine",
    "Model",
    "Questions",
    "SegmentEncoder",
    "Source",
    "Task",
    "at_least",
    "current_memory",
    "feed",
    "fit",
    "make",
    "memorize",
    "open_model",
    "open_stream",
    "open_table",
    "register_logger",
    "register_machine",
    "register_metric",
    "register_schedule",
    "register_source",
    "segment",
    "setting",
]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'rmjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
