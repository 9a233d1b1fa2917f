"""The figures of docs show the numbers of their records, and the gallery shows every figure."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys

import pytest

from rmjax.tools import ledger
from rmjax.tools.tables import LABELS, TABLES
from tests import ROOT

DOCS = ROOT / "docs"
SCRIPTS = sorted(path.stem for path in (DOCS / "figures").glob("*.py"))
GALLERY = (DOCS / "gallery.md").read_text()
SHOWN = {
    path: alt for alt, path in re.findall(r"!\[([^\]]*)\]\((images/[^)]+)\)", GALLERY, re.DOTALL)
}
DRAWN = sorted(path for path in (DOCS / "images").iterdir() if path.name != "overview.svg")


@pytest.fixture
def figures(monkeypatch):
    """Imports a script of docs/figures, which forgets it after the test."""
    monkeypatch.syspath_prepend(str(DOCS / "figures"))
    for name in SCRIPTS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def lines_of(figure):
    return [line for axes in figure.axes for line in axes.get_lines()]


def line_of(figure, label):
    (line,) = [line for line in lines_of(figure) if str(line.get_label()).startswith(label)]
    return list(line.get_ydata())


def test_a_changed_record_changes_the_figures(figures, tmp_path, monkeypatch):
    shutil.copytree(DOCS / "results" / "records", tmp_path / "records")
    path = tmp_path / "records" / "recall.json"
    record = json.loads(path.read_text())
    (row,) = [row for row in record["tables"][0]["rows"] if row["memory"] == "CM"]
    row["16"] = {"values": [0.25, 0.5]}  # as `rmjax.ablate --record` writes it
    path.write_text(json.dumps(record))
    capacity, state_size = figures("capacity"), figures("state_size")
    assert line_of(capacity.draw(), "CM")[-1] == line_of(state_size.draw(), "CM")[-1] != 0.375
    monkeypatch.setattr(figures("common"), "RECORDS", tmp_path / "records")
    assert line_of(capacity.draw(), "CM")[-1] == line_of(state_size.draw(), "CM")[-1] == 0.375


def test_lines_are_the_measured_numbers(figures):
    runs = figures("common").read("recall")
    drawn = line_of(figures("forgetting").draw(), "RM")
    assert drawn == runs["RM"]["by_age"]
    sizes = line_of(figures("state_size").draw(), "Gated delta rule")
    assert sizes[-1] == runs["Gated delta rule, d = 24"]["pairs"]["16 pairs"]


def test_each_task_of_recall_has_its_own_lines(figures):
    left, right = figures("capacity").draw().axes
    for axes, name in ((left, "Associative recall"), (right, "Joint recall")):
        (row,) = [row for row in common_rows("recall", name) if row["memory"] == "RM"]
        numbers = [ledger.mean(cell) for key, cell in row.items() if key.split()[0].isdigit()]
        assert numbers in [list(line.get_ydata()) for line in axes.get_lines()]
    assert any(line.get_label() == "RM (512)" for line in left.get_lines())


def test_the_labels_of_the_figure_are_those_of_the_table(figures):
    module = figures("few_labels")
    assert [*module.LABELS] == sorted(LABELS, key=lambda name: module.LABELS[name])
    assert {*module.ROWS} == {*TABLES["few"].rows}
    (row,) = [row for row in common_rows("few", "1 a user") if row["row"] == "with rehearsal"]
    drawn = line_of(module.draw(), "with rehearsal")
    assert ledger.mean(row["auc"]) in drawn


def test_the_lines_of_long_streams_are_the_means_of_the_record(figures):
    early, later = figures("long_streams").draw().axes
    for axes, part in ((early, "early"), (later, "later")):
        for row in TABLES["forgetting"].rows:
            cells = [
                next(line for line in common_rows("long_streams", setting) if line["row"] == row)
                for setting in TABLES["forgetting"].settings
            ]
            (drawn,) = [line for line in axes.get_lines() if line.get_label() == row]
            assert list(drawn.get_ydata()) == [ledger.mean(line[part]) for line in cells]
            assert list(drawn.get_xdata()) == [6, 20, 50, 100]


def common_rows(record, name):
    tables = ledger.read(DOCS / "results" / "records" / f"{record}.json")["tables"]
    (rows,) = [table["rows"] for table in tables if table.get("name") == name]
    return rows


def test_a_missing_table_is_named(figures):
    with pytest.raises(ValueError, match="no table 'Sizes': it has 'Associative recall'"):
        figures("common").table("recall", "Sizes", "memory")


def test_engrams_stand_at_their_place_in_the_story(figures):
    engrams = figures("engrams")
    working, story = engrams.CONFIG.working, engrams.STORY
    serial = 5 * working + 3
    first, second = engrams.places([serial, serial + story * working])
    outer = (second**2).sum() ** 0.5 - (first**2).sum() ** 0.5
    assert abs(first[0] * second[1] - first[1] * second[0]) < 1e-9  # the same angle
    assert abs(outer - 0.5) < 1e-9


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: path.name)
def test_the_gallery_shows_a_figure_with_an_alternative_text_and_its_command(path):
    alt = SHOWN.get(f"images/{path.name}", "")
    assert len(alt.split()) >= 10, f"docs/gallery.md shows no {path.name} with a text of ten words"
    script = path.stem if path.stem in SCRIPTS else "from_notebooks"
    assert f"python docs/figures/{script}.py" in GALLERY


def test_the_gallery_shows_no_other_files():
    assert {DOCS / path for path in SHOWN} <= {*DRAWN}


def test_figures_of_notebooks_are_those_that_are_stored(figures):
    module = figures("from_notebooks")
    for name, (notebook, place) in module.FIGURES.items():
        stored = module.images(notebook)[place]
        assert (DOCS / "images" / f"{name}.png").read_bytes() == stored, f"{name}: copy it again"


def test_figures_are_small():
    sizes = {path.name: path.stat().st_size for path in (DOCS / "images").iterdir()}
    assert sizes["engrams.webp"] < 1_000_000
    assert sum(sizes.values()) < 3_000_000
