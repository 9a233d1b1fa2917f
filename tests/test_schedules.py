"""Schedules by name: their first and last factors, their keys, and one from outside the package."""

from __future__ import annotations

import dataclasses
import types

import pytest

import rmjax
from rmjax import config as configs
from rmjax import schedules
from rmjax.registry import SCHEDULES
from tests.runs import tiny

ENDS = {"constant": (1, 1), "cosine": (1, 0), "linear": (1, 0), "falling": (1, 0), "rising": (0, 1)}


@pytest.mark.parametrize("name", ENDS)
def test_a_schedule_goes_from_its_first_to_its_last_factor(name):
    schedule = schedules.build(name, 10) or (lambda step: 1.0)
    assert (float(schedule(0)), float(schedule(10))) == pytest.approx(ENDS[name])
    assert float(schedule(10)) == float(schedule(99))


@pytest.mark.parametrize("key", ["train.schedule", "rehearsal.schedule"])
def test_both_keys_take_every_name(key):
    for name in ENDS:
        assert tiny(**{key: name})
    wrong = rf"config\.{key} = 'cosin': must be a string, one of constant, cosine, "
    with pytest.raises(ValueError, match=wrong):
        tiny(**{key: "cosin"})


def test_a_schedule_from_outside_has_a_name_and_keys(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Settings:
        every: int = rmjax.setting(5, rmjax.at_least(1), "steps after which the factor is halved")

    monkeypatch.setattr(SCHEDULES, "_registered", {})
    halve = lambda settings, steps: lambda step: 0.5 ** (step // settings.every)
    rmjax.register_schedule("halving", Settings)(halve)
    config = tiny(**{"train.schedule": "halving", "schedule.every": 3})
    assert schedules.build(config.train.schedule, 10, config)(7) == 0.25
    assert configs.reads(config, "schedule.every") and not configs.reads(tiny(), "schedule.every")
    wrong = r"config\.schedule\.every = 0: must be a whole number, at least 1"
    with pytest.raises(ValueError, match=wrong):
        tiny(**{"train.schedule": "halving", "schedule.every": 0})
    assert schedules.build("halving", 10, types.SimpleNamespace(schedule={}))(5) == 0.5
