"""report.html and learning_curve.png: what they show, and that every run writes them."""

from __future__ import annotations

import html.parser
import json

import pytest

from rmjax.run import report
from rmjax.run.report import Figure, figure, page, read_figures, ticks
from tests.runs import tiny


class Page(html.parser.HTMLParser):
    """Collects tags and text; every tag must be closed in order."""

    VOID = frozenset({"meta"})

    def __init__(self, content: str):
        super().__init__()
        self.open, self.tags, self.text, self.sources = [], [], [], []
        self.feed(content)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_curves_are_those_of_the_metrics_and_broken_lines_are_left_out(tmp_path):
    lines = [
        {"stage": "model", "kind": "train", "step": 1, "loss": 2.0, "reason": 1.5},
        {"stage": "model", "kind": "train", "step": 2, "loss": "nan", "reason": 1.0},
        {"stage": "model", "kind": "valid", "step": 2, "auc": 0.75, "hr@1": 0.1, "hr@10": 0.5},
        {"stage": "teacher", "kind": "valid", "step": 1, "auc": 0.5},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"stage": "mod')
    assert read_figures(path) == [
        Figure("model: losses", {"loss": [(1, 2.0)], "reason": [(1, 1.5), (2, 1.0)]}),
        Figure("model: valid, auc", {"auc": [(2, 0.75)]}),
        Figure("model: valid, hr", {"hr@1": [(2, 0.1)], "hr@10": [(2, 0.5)]}),
        Figure("teacher: valid, auc", {"auc": [(1, 0.5)]}),
    ]
    assert read_figures(tmp_path / "missing.jsonl") == []


def test_a_page_has_all_numbers_escapes_names_and_needs_no_other_file():
    rows = [{"memory": "<mine> & yours", "test AUC": 0.6789, "low": None}]
    curves = [Figure("model: losses", {"loss": [(0, 3.0), (10, 1.0)]})]
    config = tiny(**{"machine.kind": "gru", "train.steps": 7})
    shown = Page(page("a<b", config, {"Test": rows}, curves))
    assert {"a<b", "<mine> & yours", "0.6789", "-", "train.steps", "7"} <= {*shown.text}
    assert "svg" in shown.tags and not shown.sources
    assert "machine.slots" not in shown.text  # the run does not read it


@pytest.mark.parametrize("values", [[5.0], [5.0, 5.0], [0.0, 0.0], [-1e-9, 1e-9], [1e12, -3.0]])
def test_every_point_is_inside_of_its_figure(values):
    content = figure(Figure("x", {"a": list(enumerate(values))}))
    Page(content)
    path = content.split('d="M')[-1].split('"')[0]
    for point in path.split("L"):
        x, y = map(float, point.split(","))
        assert 0 <= x <= report._WIDTH and 0 <= y <= report._HEIGHT


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 17), (0.641, 0.677), (1e-9, 2e-9)])
def test_ticks_are_round_and_inside(low, high):
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 8 and low <= marks[0] and marks[-1] <= high
    assert all(float(f"{mark:.3g}") == pytest.approx(mark, rel=1e-9, abs=1e-12) for mark in marks)
