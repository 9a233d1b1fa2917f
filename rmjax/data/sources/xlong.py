"""XLong, see `rmjax.data.clicks.xlong`; without its files simulated clicks."""

from __future__ import annotations

import dataclasses
from typing import Any

from absl import logging

from rmjax.data.source import Source, cached
from rmjax.registry import SOURCES


@dataclasses.dataclass(frozen=True)
class Settings:
    """None."""


def make(settings: Settings, common: Any, seed: int) -> Source:
    if not common.dir:
        logging.info("config.data.dir is empty: simulated clicks in place of XLong.")
        made = SOURCES.settings("simulated_clicks", common.simulated, "config.data.simulated.")
        return SOURCES["simulated_clicks"].make(made, common, seed)
    from rmjax.data.clicks.xlong import xlong

    return cached(xlong(common.dir, common.cache_dir, seed), common.ram_bytes)
