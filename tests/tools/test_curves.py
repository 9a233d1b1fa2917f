"""The figure of accuracy by the number of pairs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rmjax.run.workdir import Preemption
from rmjax.tools import ablate, curves
from rmjax.tools.tables import Row, Table


def line(memory, *points, **costs):
    names = ("4 pairs", "16 pairs", "8 pairs")
    return {
        "memory": memory,
        "test_accuracy": 0.1,
        **dict(zip(names, points, strict=True)),
        **costs,
    }


ROWS = {
    "RM": [
        [line("m", 0.9, 0.1, 0.5, state_bytes=512), line("oracle", 1.0, 1.0, 1.0)],
        [line("m", 0.7, 0.3, 0.5)],
    ],
    "GRU": [[line("g", 0.25, 0.0, 0.125, state_bytes=64), line("oracle", 1.0, 1.0, 1.0)]],
}


def test_points_are_means_over_seeds_in_the_order_of_their_numbers():
    rm, gru, oracle = curves.curves(ROWS, " pairs")
    assert (rm.name, rm.state, rm.seeds, rm.x) == ("RM", 512, 2, [4, 8, 16])
    np.testing.assert_allclose(rm.mean, [0.8, 0.5, 0.2])
    np.testing.assert_allclose(rm.std, np.array([0.2, 0.0, 0.2]) / np.sqrt(2))
    assert (gru.state, gru.seeds, gru.mean, gru.std) == (64, 1, [0.25, 0.125, 0.0], [0.0] * 3)
    assert (oracle.name, oracle.state, oracle.seeds, oracle.mean) == ("oracle", None, 0, [1.0] * 3)
    assert curves.curves(ROWS, " words") == []


def test_the_table_in_markdown_has_a_column_for_each_point():
    made = curves.curves(ROWS, " pairs")
    made[1] = made[1]._replace(x=[8], mean=[0.125], std=[0.0])
    assert curves.markdown(made, " pairs").splitlines() == [
        "| memory | bytes of state | seeds | 4 pairs | 8 pairs | 16 pairs |",
        "| --- | --- | --- | --- | --- | --- |",
        "| RM | 512 | 2 | 0.800 ± 0.141 | 0.500 ± 0.000 | 0.200 ± 0.141 |",
        "| GRU | 64 | 1 | - | 0.125 | - |",
        "| oracle | - | 0 | 1.000 | 1.000 | 1.000 |",
    ]


def test_a_table_with_a_curve_is_drawn_when_its_runs_are_finished(tmp_path, monkeypatch, caplog):
    drawing = pytest.importorskip("matplotlib.figure").Figure
    table = Table("a title", {name: Row({}) for name in ROWS}, curve=" pairs")
    todo = ablate.jobs(table, tmp_path, 2)
    finished = lambda job, *_: (ROWS[job.row][job.seed :] or [None])[0]
    monkeypatch.setattr(ablate, "run", finished)
    figures = []
    kept = drawing.savefig
    keep = lambda figure, *args, **options: figures.append(figure) or kept(figure, *args, **options)
    monkeypatch.setattr(drawing, "savefig", keep)
    with Preemption() as stop:
        assert ablate.run_all(table, todo, [], tmp_path, "recall", stop) == 1  # one run failed
        made = json.loads((tmp_path / "curve.json").read_text())
        assert [c["name"] for c in made] == ["RM", "GRU", "oracle"]
        assert made[0]["mean"] == pytest.approx([0.8, 0.5, 0.2]) and made[0]["state"] == 512
        assert (tmp_path / "curve.md").read_text().startswith("| memory |")
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
        (axes,) = figures[0].axes
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert sorted(names) == ["GRU (64 bytes of state)", "RM (512 bytes of state)", "oracle"]
        assert axes.get_ylabel() == "test accuracy" and axes.get_ylim() == (0, 1.02)
        other = table._replace(curve=" words")
        (tmp_path / "curve.png").unlink()
        ablate.run_all(other, todo, [], tmp_path, "recall", stop)
    assert "no figure: the results have no columns such as '4 words'" in caplog.text
    assert not (tmp_path / "curve.png").exists()
