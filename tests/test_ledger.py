"""Records of results are the only source of the numbers in the documents."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys

import jax
import pytest

from rmjax import machines
from rmjax.registry import MACHINES, fields_of
from rmjax.tools import ablate, ledger
from rmjax.tools.tables import Row, Table
from tests import ROOT

RECORDS = ROOT / "docs" / "results" / "records"
TABLES = RECORDS.parent / "readme.json"
NAMES = sorted(path.stem for path in RECORDS.glob("*.json"))


def load(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pages = load("ledger")


def test_pages_and_readme_equal_the_records():
    old = [str(path) for path, text in pages.files() if path.read_text() != text]
    assert not old, "run: python docs/ledger.py"


def test_all_that_is_made_is_up_to_date():
    """In a process of its own, since other tests register kinds, which have keys."""
    command = [sys.executable, "docs/pages.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_of_machines_has_every_machine_with_its_keys(monkeypatch):
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    extension = importlib.import_module("extensions.machines")
    source = [(ROOT / "docs" / "api" / "machines.md").read_text()]
    extension.read(None, "api/machines", source)
    for kind in rmjax_machines():
        _, own = source[0].split(f"## `{kind}`\n")
        own = own.split("\n## ")[0]
        module = importlib.import_module(MACHINES[kind].make.__module__)
        assert module.__doc__ and f".. automodule:: {module.__name__}\n" in own
        assert all(f"`machine.{key}`" in own for key in fields_of(MACHINES[kind].settings))


def rmjax_machines():
    return {kind for kind in MACHINES if MACHINES[kind].settings.__module__.startswith("rmjax.")}


def test_every_measured_number_of_readme_is_in_a_record():
    text = re.sub(r"```.*?```|\]\([^)]*\)", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    known = "\n".join(path.read_text() for path in RECORDS.parent.glob("*.md"))
    known += pages.readme_table("tasks", pages.records(), json.loads(TABLES.read_text()))
    versions = {"1.0", "1.2", "2.0", "3.11"}  # of bAbI, of this package, of the licence, of Python
    numbers = set(re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", text)) - versions
    assert len(numbers) > 20
    missing = sorted(n for n in numbers if not re.search(rf"(?<![\d.]){re.escape(n)}(?!\d)", known))
    assert not missing, "write them into docs/results/records, or take them out"


@pytest.fixture
def copy(tmp_path):
    """A copy of the records, with a README that shows three tables."""
    shutil.copytree(ROOT / "docs" / "results", tmp_path / "docs" / "results")
    parts = [f"<!-- ledger: {name} -->\n<!-- /ledger -->\n" for name in ("tasks", "clicks")]
    (tmp_path / "README.md").write_text("before\n" + "".join(parts) + "after\n")
    return tmp_path


def written(root):
    return {path.relative_to(root).as_posix(): text for path, text in pages.files(root)}


def test_another_number_in_a_record_changes_its_page_and_readme(copy):
    before = written(copy)
    assert before["README.md"].count("0.7606 ± 0.0040") == 2
    path = copy / "docs" / "results" / "records" / "clicks.json"
    path.write_text(path.read_text().replace("0.7635", "0.9735"))
    after = written(copy)
    changed = [name for name in before if before[name] != after[name]]
    assert sorted(changed) == ["README.md", "docs/results/clicks.md"]
    mean = (0.9735 + 0.7623 + 0.7560) / 3
    assert after["README.md"].count(f"{mean:.4f} ± ") == 2
    assert after["README.md"].startswith("before\n") and after["README.md"].endswith("after\n")
    assert "0.9735, 0.7623, 0.7560" in after["docs/results/clicks.md"]


def test_a_table_or_number_that_no_record_has_is_named(copy):
    readme = copy / "README.md"
    readme.write_text("<!-- ledger: clikcs -->\n<!-- /ledger -->\n")
    with pytest.raises(ValueError, match="'clikcs'; there are tasks, memories, babi"):
        written(copy)
    known = pages.records()
    assert pages.number("cm1#discrete|Multi-Hop Reason|accuracy", known) == "0.937 ± 0.007"
    assert pages.number("cm1#consecutive|Multi-Hop Reason|accuracy", known) == "1.000 ± 0.000"
    for wrong in ("cm1#discrete|CM (Full)|acc", "cm1|CM|all", "cm9|CM|all", "clicks|RM|test AUC"):
        with pytest.raises(ValueError, match=re.escape(wrong)):
            pages.number(wrong, known)


@pytest.mark.parametrize("name", NAMES)
def test_a_record_asks_says_and_limits(name):
    record = ledger.read(RECORDS / f"{name}.json")
    assert record["question"].endswith("?") and record["setting"] and record["commands"]
    assert record["shows"] and record["not_shown"]
    assert f"({name}.md)" in (RECORDS.parent / "index.md").read_text()
    for table in record["tables"]:
        head, *rows = ledger.grid(table)
        assert {len(row) for row in rows} == {len(head)}


def cells():
    for name in NAMES:
        for table in ledger.read(RECORDS / f"{name}.json")["tables"]:
            for row in table["rows"]:
                yield from ((name, table, c) for c in row.values() if not isinstance(c, str))


def test_means_and_stds_that_are_written_down_are_those_of_the_seeds():
    """They may differ in the last digit, since the values of seeds are rounded."""
    for name, table, cell in cells():
        if len(cell.get("values", [])) > 1:
            plain = {"values": cell["values"]}
            close = 1.01 * 10.0 ** -cell.get("digits", table.get("digits", ledger.DIGITS))
            assert abs(ledger.mean(cell) - ledger.mean(plain)) < close, (name, cell)
            assert abs(ledger.std(cell) - ledger.std(plain)) < close, (name, cell)


def test_a_cell_shows_mean_and_sample_std():
    assert ledger.shown({"values": [1.0, 2.0, 3.0]}, 2) == "2.00 ± 1.00"
    assert ledger.shown({"values": [0.5]}) == "0.5000"
    assert ledger.shown({"mean": 5124.0, "digits": 0}) == "5,124"
    assert ledger.shown("text") == "text" and ledger.shown({"paper": 1.0}) == ""
    rows = [{"row": "a", "x": {"values": [1.0, 2.0], "paper": 0.25}}, {"row": "b|c"}]
    table = ledger.grid({"digits": 1, "rows": rows})
    assert table == [
        ["row", "x", "x, by seed", "x, paper"],
        ["a", "1.5 ± 0.7", "1.0, 2.0", "0.25"],
        ["b|c", "", "", ""],
    ]
    assert ledger.markdown(table).splitlines()[3] == "| b\\|c | | | |"


@pytest.mark.parametrize(
    ("field", "value", "cause"),
    [
        ("question", None, "'question' is missing"),
        ("tabels", [], "no such field 'tabels'"),
        ("shows", "much", "'shows' must be a list"),
        ("tables", [{"rows": [{"row": "a", "x": 0.5}]}], r"tables\[0\]: a row has a cell"),
        ("tables", [{"rows": [{"row": "a", "x": {"man": 1}}]}], r"tables\[0\]: a row has a cell"),
        (
            "tables",
            [{"rows": [{"row": "a", "x": {"mean": "1"}}]}],
            r"tables\[0\]: a row has a cell",
        ),
        (
            "tables",
            [{"rows": [{"row": "a", "x": {"values": 1}}]}],
            r"tables\[0\]: a row has a cell",
        ),
        ("tables", [{"rows": [{"row": "a", "x": {"values": [1.0], "intervals": []}}]}], "a cell"),
        ("tables", ["rows"], r"tables\[0\] must be an object with a list of rows"),
        ("tables", [{"rows": [{}]}], r"tables\[0\]: the first cell of a row is its name"),
        ("tables", [{"rows": [{"x": {"mean": 1.0}}]}], "the first cell of a row is its name"),
    ],
)
def test_a_wrong_record_is_named_by_file_and_field(tmp_path, field, value, cause):
    record = json.loads((RECORDS / "clicks.json").read_text()) | {field: value}
    if value is None:
        del record[field]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"mine.json.*{cause}"):
        ledger.read(path)


def results():
    """Two seeds of two rows in two settings, and an oracle."""
    oracle = {"memory": "oracle", "test_auc": 0.9}
    run = lambda auc: [{"memory": "m", "test_auc": auc, "low": 0, "state_floats": 8}, oracle]
    return {
        (setting, row, seed): run(0.5 + seed / 10 + (row == "b") / 4)
        for setting in "xy"
        for row in "ab"
        for seed in (0, 1)
    }


def test_a_table_of_ablate_writes_a_record_and_keeps_its_prose(tmp_path):
    rows = {"a": Row({}, {"x": {"test_auc": 18.71 / 100}}), "b": Row({})}
    table = Table("A table", rows, {"x": {}, "y": {}})
    record = ablate.record_of(table, results(), "d", ["--table=t", "--rows=b c"])
    path = tmp_path / "new" / "t.json"
    ledger.keep(path, record)
    first = ledger.read(path)
    assert first["commands"] == ["python -m rmjax.ablate --table=t '--rows=b c'"]
    assert first["seeds"] == [0, 1] and [t["name"] for t in first["tables"]] == ["x", "y"]
    assert ledger.grid(first["tables"][0]) == [
        ["row", "auc", "auc, by seed", "auc, paper", "state floats"],
        ["a", "0.5500 ± 0.0707", "0.5000, 0.6000", "0.1871", "8"],
        ["b", "0.8000 ± 0.0707", "0.7500, 0.8500", "", "8"],
        ["oracle", "0.9000", "", "", ""],
    ]
    by_hand = {"name": "probe", "rows": [{"row": "c", "z": {"mean": 1.0}}]}
    prose = first | {"question": "Why?", "tables": [*first["tables"], by_hand]}
    prose["tables"][1]["text"] = "Of y."
    path.write_text(json.dumps(prose))
    ledger.keep(
        path, ablate.record_of(table, {("y", "a", 3): results()["y", "a", 1]}, "d", ["--rows=a"])
    )
    second = ledger.read(path)
    assert second["question"] == "Why?" and second["seeds"] == [0, 1, 3]
    assert second["commands"] == [*first["commands"], "python -m rmjax.ablate --rows=a"]
    assert [t["name"] for t in second["tables"]] == ["x", "y", "probe"]
    assert second["tables"][0] == first["tables"][0] and second["tables"][1]["text"] == "Of y."
    assert second["tables"][1]["rows"][0]["auc"] == {"values": [0.6]}
    assert second["tables"][1]["rows"][1] == first["tables"][1]["rows"][1]
    assert second["tables"][2] == by_hand
    path.write_text(json.dumps(second | {"tables": second["tables"][:2]}))
    ledger.keep(path, record)  # all rows are measured anew
    assert ledger.read(path)["commands"] == first["commands"]
    assert ledger.read(path)["seeds"] == [0, 1]


def test_a_wide_table_has_a_column_for_each_row(tmp_path):
    table = Table("A table", {"a": Row({}), "b": Row({})}, {"x": {}, "y": {}}, wide=True)
    path, half = tmp_path / "t.json", {k: v for k, v in results().items() if k[:2] != ("y", "b")}
    ledger.keep(path, ablate.record_of(table, half, "d", ["--table=t"]))
    half = {("y", "b", 0): results()["y", "b", 1]}
    ledger.keep(path, ablate.record_of(table, half, "d", ["--settings=y", "--rows=b"]))
    record = ledger.read(path)
    assert len(record["commands"]) == 2 and ledger.grid(record["tables"][0]) == [
        ["setting", "a", "a, by seed", "b", "b, by seed"],
        ["x", "0.5500 ± 0.0707", "0.5000, 0.6000", "0.8000 ± 0.0707", "0.7500, 0.8500"],
        ["y", "0.5500 ± 0.0707", "0.5000, 0.6000", "0.8500", "0.8500"],
    ]


def test_a_record_has_the_differences_that_are_printed(tmp_path):
    table = Table("A table", {"a": Row({}), "b": Row({})}, {"x": {}, "y": {}}, baseline="a")
    runs = results()
    runs["x", "b", 1] = [{**runs["x", "b", 1][0], "test_auc": 0.95}]
    record = ablate.record_of(table, runs, "d", ["--table=t"])
    assert [t["name"] for t in record["tables"]] == [
        "x", "y", "Differences from 'a', paired by seed"
    ]  # fmt: skip
    assert ledger.grid(record["tables"][2]) == [
        ["row", "difference", "95% from", "to", "seeds"],
        ["x, b, auc", "0.3000", "0.2500", "0.3500", "2"],
        ["y, b, auc", "0.2500", "0.2500", "0.2500", "2"],
    ]
    alone = {key: value for key, value in runs.items() if key[2] == 0}  # one seed has no interval
    assert len(ablate.record_of(table, alone, "d", [])["tables"]) == 2
    ledger.keep(tmp_path / "t.json", record)


def test_the_bytes_of_every_memory_are_those_of_its_state():
    """At d = 64 and K = N = 20, of a stream of 1,000 items."""
    (table,) = ledger.read(RECORDS / "memories.json")["tables"]
    rows = {row["kind"].strip("`"): row for row in table["rows"]}
    assert rows.keys() == rmjax_machines()
    for kind, row in rows.items():
        slots = {"slots": 20} if hasattr(MACHINES[kind].settings(), "slots") else {}
        machine = machines.make(kind, 1000, dim=64, segment_length=20, max_items=1000, **slots)
        params = jax.eval_shape(machine.init, jax.random.key(0))
        memory = jax.eval_shape(lambda params, m=machine: m.init_memory(params, 1), params)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(memory))
        assert row["bytes of state"]["mean"] == size, f"{kind}: the state has {size} bytes"
        assert (row["grows"] == "no") == machine.constant_size, kind
        assert (row["gradients"] == "all") == (machine.gradient_range is None), kind
        assert (ROOT / row["file"].strip("`")).exists()
