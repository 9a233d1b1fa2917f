"""What memories cost, against counts by hand."""

from __future__ import annotations

import jax
import pytest

from rmjax import config as configs
from rmjax import machines, tasks
from rmjax.data.source import Description
from rmjax.machines import costs_of
from tests.runs import tiny
from tests.small import ITEMS, MACHINES, N


@pytest.mark.parametrize("name", MACHINES)
def test_costs_count_every_parameter_and_byte_once(name):
    kind, settings = MACHINES[name]
    machine = machines.make(kind, ITEMS, **settings)
    costs, params = costs_of(machine, N), jax.eval_shape(machine.init, jax.random.key(0))
    total = sum(x.size for x in jax.tree.leaves(params))
    assert costs.item_parameters == ITEMS * 8
    assert costs.parameters == total - ITEMS * 8 > 0
    assert costs.state_bytes > 4 * costs.state_floats and costs.flops_per_item > 0


def test_the_costs_of_a_gru_are_those_of_its_matrices():
    """State: h and the mean [d], and a number of items. Work: 2 d 3 d for inputs, and for h."""
    costs = costs_of(machines.make("gru", 10, dim=64), 20)
    assert costs.state_floats == 2 * 64 + 1 and costs.state_bytes == 4 * (2 * 64 + 2)
    gru, reader = 6 * 64**2 + 4 * 64, 3 * 64**2 + 64
    assert costs.parameters == gru + reader and costs.item_parameters == 640
    assert costs.flops_per_item == pytest.approx(12 * 64**2, rel=0.05)


def test_costs_take_in_the_machines_own_loss():
    some = machines.make("dmsdnc", ITEMS, dim=8, slots=4)
    none = machines.make("dmsdnc", ITEMS, dim=8, slots=4, refresh_rate=0.0)
    assert costs_of(some, N).flops_per_item > costs_of(none, N).flops_per_item


def test_costs_do_not_depend_on_the_loop_over_items():
    machine = machines.make("gru", 10, dim=64)
    few, many = (costs_of(machine, length).flops_per_item for length in (5, 50))
    assert few == pytest.approx(many, rel=0.05)


def test_a_config_has_costs_without_data():
    config = tiny(**{"machine.kind": "rmt"})
    small, large = (tasks.costs(config, Description(num_items=n)) for n in (10, 1000))
    dim = config.machine.dim
    assert small.state_floats == config.machine.slots * dim
    assert large.item_parameters == 1000 * dim
    assert small._replace(item_parameters=1000 * dim) == large
    config = configs.base()
    video = tasks.costs(config, Description(num_items=0, feature_width=32))
    assert video.item_parameters == 0 and video.parameters > 32 * 64
