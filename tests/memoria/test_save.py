"""A loaded memory goes on as if it had never been saved, and only under its own config."""

from __future__ import annotations

import dataclasses
import json

import chex
import jax
import pytest

from rmjax import memoria
from rmjax.memoria import MemoriaConfig
from tests.memoria.runs import at, run, small, stream

CONFIG = small(lifespan_extend=4.0)
same = chex.assert_trees_all_equal


def test_a_loaded_memory_goes_on_bit_for_bit(tmp_path):
    xs = stream(CONFIG, 30)
    steps = run(CONFIG, xs)
    memoria.save(CONFIG, at(steps.after, 14), tmp_path / "state.v1")
    state = memoria.load(CONFIG, tmp_path / "state.v1")
    same(state, at(steps.after, 14))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, memoria.init(CONFIG))
    same(at(run(CONFIG, at(xs, slice(15, None)), state).after, -1), at(steps.after, -1))
    assert [path.name for path in tmp_path.iterdir()] == ["state.v1"]


def test_many_streams_and_saving_again(tmp_path):
    states = memoria.fork(memoria.init(CONFIG), 3)
    path = tmp_path / "folder" / "state"
    memoria.save(CONFIG, states, path)
    memoria.save(CONFIG, states.replace(evicted=states.evicted + 2), path)
    loaded = memoria.load(CONFIG, path)
    assert loaded.evicted.tolist() == [2, 2, 2]
    assert loaded.counts.shape == (3, CONFIG.capacity, CONFIG.capacity)
    same(memoria.load(MemoriaConfig(**vars(CONFIG) | {"checked": True}), path), loaded)


def test_another_config_is_refused_and_the_difference_is_named(tmp_path):
    memoria.save(CONFIG, memoria.init(CONFIG), tmp_path / "state")
    message = "another config: search_depth: saved 2, asked 7; ties: saved 'hash', asked 'oldest'$"
    with pytest.raises(ValueError, match=message):
        memoria.load(small(lifespan_extend=4.0, search_depth=7, ties="oldest"), tmp_path / "state")


def test_loading_nothing_and_saving_a_wrong_state_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing was saved"):
        memoria.load(CONFIG, tmp_path / "nothing")
    message = r"state.counts is int16\[29, 29\], but this config's is int8"
    with pytest.raises(ValueError, match=message):
        memoria.save(
            small(counts_dtype="int8", long_term_capacity=20),
            memoria.init(small()),
            tmp_path / "state",
        )
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_saving_never_replaces_files_of_others(tmp_path, kind):
    theirs = tmp_path / "mine" / "thesis.tex" if kind == "folder" else tmp_path / "mine"
    for path in (theirs, tmp_path / "mine.old" / "notes", tmp_path / "mine.tmp" / "notes"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("years of work")
    message = "was not saved by this library: take another name, or move it"
    with pytest.raises(FileExistsError, match=message):
        memoria.save(CONFIG, memoria.init(CONFIG), tmp_path / "mine")
    memoria.save(CONFIG, memoria.init(CONFIG), tmp_path / "mine.old" / "state")
    assert theirs.read_text() == "years of work" and len(list(tmp_path.rglob("notes"))) == 2


def test_a_field_missing_from_a_saved_config_has_its_default(tmp_path, monkeypatch):
    known = {
        name: value
        for name, value in dataclasses.asdict(CONFIG).items()
        if name != "follow_zero_edges"
    }
    monkeypatch.setattr("rmjax.memoria.saving.dataclasses.asdict", lambda config: known)
    memoria.save(CONFIG, memoria.init(CONFIG), tmp_path / "old")
    monkeypatch.undo()
    same(memoria.load(CONFIG, tmp_path / "old"), memoria.init(CONFIG))
    with pytest.raises(ValueError, match="follow_zero_edges: saved True, asked False"):
        memoria.load(MemoriaConfig(**vars(CONFIG) | {"follow_zero_edges": False}), tmp_path / "old")


@pytest.mark.parametrize("file", ["manifest.json", "SHA256SUMS", "arrays"])
def test_a_damaged_state_is_named(tmp_path, file):
    path = tmp_path / "state"
    memoria.save(CONFIG, memoria.init(CONFIG), path)
    if file == "arrays":
        victim = max(
            (f for f in (path / file).rglob("*") if f.is_file()), key=lambda f: f.stat().st_size
        )
    else:
        victim = path / file
    victim.write_bytes(victim.read_bytes()[:-3] + b"}}}")
    with pytest.raises(ValueError, match="is damaged: "):
        memoria.load(CONFIG, path)


def test_a_state_of_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("rmjax.memoria.saving.VERSION", 0)
    memoria.save(CONFIG, memoria.init(CONFIG), tmp_path / "old")
    monkeypatch.undo()
    message = "of version 0; this code reads Memoria states of version 1"
    with pytest.raises(ValueError, match=message):
        memoria.load(CONFIG, tmp_path / "old")


def test_a_save_that_was_killed_between_its_renames_loses_nothing(tmp_path):
    memoria.save(CONFIG, memoria.init(CONFIG), tmp_path / "state")
    (tmp_path / "state").rename(tmp_path / ".state.rmjax-old")
    (tmp_path / ".state.rmjax-new").mkdir()
    same(memoria.load(CONFIG, tmp_path / "state"), jax.tree.map(lambda x: x, memoria.init(CONFIG)))
    memoria.save(CONFIG, memoria.init(CONFIG), tmp_path / "state")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    manifest = json.loads((tmp_path / "state" / "manifest.json").read_text())
    assert manifest["memoria"]["config"]["short_term_capacity"] == 6
