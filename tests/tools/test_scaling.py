"""The model of many devices, on steps whose times are computed by hand."""

from __future__ import annotations

import pytest

from rmjax.tools import made_up, scaling
from rmjax.tools.scaling import Accelerator, Step

DEVICE = Accelerator(flops=100.0, memory=10.0, near=4.0, far=2.0, group=8, latency=0.5)


def step(n: int, compiled: bool = True) -> Step:
    """Gradients of 8 bytes, and 3 bytes of ids from each device."""
    collectives = {"all-reduce": (2.0, 8.0), "all-gather": (1.0, 3.0 * n)}
    return Step(200.0, 5.0, 7.0, collectives if n > 1 else {}, compiled)


def test_the_roofline():
    assert scaling.seconds_of(step(1), 1, DEVICE) == (2.0, 1.0, 0.0)
    # Two devices: half of the arrays is sent, the sum twice; 2 x 2 + 1 calls wait once.
    assert scaling.seconds_of(step(2), 2, DEVICE)[2] == pytest.approx((8 + 3) / 4 + 5 * 0.5)
    # 16 devices are two groups, and a tree of four levels.
    sent = (2 * 8 + 3 * 16) * 15 / 16
    assert scaling.seconds_of(step(16), 16, DEVICE)[2] == pytest.approx(sent / 2 + 5 * 4 * 0.5)


def test_what_is_predicted():
    row = scaling.predict(step(2), 2, DEVICE, step(1))
    assert row["step_ms"] == pytest.approx(1e3 * (2.0 + 5.25))
    assert row["efficiency"] == pytest.approx(2.0 / 7.25)
    assert row["speedup"] == pytest.approx(2.0 / (1.0 + 5.25))
    assert row["bound"] == "links" and row["basis"] == "compiled"
    assert row["collective_bytes"] == 14.0 and row["peak_bytes"] == 7.0


def test_beyond_what_was_compiled_bytes_follow_a_line_and_rows_say_so():
    expected = step(1024, compiled=False)
    assert scaling.extrapolate({1: step(1), 32: step(32), 64: step(64)}, 1024) == expected
    assert scaling.predict(expected, 1024, DEVICE, step(1))["basis"] == "extrapolated"


def test_rows(monkeypatch):
    asked = []
    measure = lambda config, source, n: asked.append(n) or step(n)
    monkeypatch.setattr(scaling, "measure", measure)
    rows = list(scaling.rows(*made_up.sized("xlong"), [1, 8, 1024]))
    assert asked == [1, 8, 32, 64]
    named = [row["assumed of"] for row in rows if "assumed of" in row]
    assert named == list(scaling.accelerators("float32"))
    for name in named:
        of = [row for row in rows if row.get("accelerator") == name]
        assert [row.get("devices") for row in of] == [1, 8, 1024, None]
        assert [row["basis"] for row in of[:3]] == ["compiled"] * 2 + ["extrapolated"]
        assert of[0]["efficiency"] == of[0]["speedup"] == 1.0
    with pytest.raises(ValueError, match="at least 1"):
        list(scaling.rows(None, None, [0]))


@pytest.mark.parametrize(
    ("compute_dtype", "rate"), [("float32", 67e12), ("tensorfloat32", 495e12), ("bfloat16", 989e12)]
)
def test_the_rate_of_products_is_that_of_their_format(monkeypatch, compute_dtype, rate):
    monkeypatch.setattr(scaling, "measure", lambda config, source, n: step(n))
    config, source = made_up.sized("xlong", {"train.compute_dtype": compute_dtype})
    rows = list(scaling.rows(config, source, [1]))
    assert rows[0]["flops"] == rate and rows[0]["products in"] == compute_dtype
    (alone,) = [row for row in rows if row.get("accelerator") == "H100" and "devices" in row]
    assert alone["arithmetic_ms"] == pytest.approx(1e3 * 200.0 / rate)


def test_where_scaling_stops():
    assert scaling.stop({1: 1.0, 8: 0.6, 64: 0.4, 128: 0.3}).startswith("at 64 devices")
    assert scaling.stop({1: 1.0, 1024: 0.7}) == "not up to 1024 devices: efficiency 0.70"
