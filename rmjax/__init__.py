"""rmjax: reasoning after memorizing. Compress a stream of any length into a fixed-size memory, then ask the memory."""

__version__ = "0.1.0"
