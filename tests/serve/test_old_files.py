"""Streams in folders of earlier versions are copied into a database; damaged folders are named.

`tests/fixtures/streams` was written by the last version with such folders. It is a store of 4 slots
with the users 'ann', 'bob' and 7, and a slot whose user was reset.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from rmjax.machines.live import open_stream
from rmjax.serve import old_files
from rmjax.serve.old_files import import_streams
from rmjax.serve.rows import about
from tests import ROOT
from tests.serve.test_streams import PARAMS, TASK, N, same, streams

HISTORIES = {"ann": list(range(9)), "bob": [], 7: [3, 14, 15, 9, 2]}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the fixture, whose digest is that of the parameters as this JAX draws them."""
    copy = tmp_path / "old"
    shutil.copytree(ROOT / "tests" / "fixtures" / "streams", copy)
    blank = open_stream(TASK.machine, PARAMS["machine"], 1, N)
    index = json.loads((copy / "index.json").read_text())
    index["machine"] = about(blank, PARAMS["machine"], N)["machine"]
    del index["sha256"]  # as after an edit on purpose
    (copy / "index.json").write_text(json.dumps(index))
    return copy


def test_all_streams_are_copied(tmp_path, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert import_streams(TASK, PARAMS, folder, tmp_path / "new") == 3
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    store = streams(store=tmp_path / "new")
    assert len(store) == 3 and "gone" not in store
    assert store.info("ann")[:2] == (9, (folder / "index.json").stat().st_mtime)
    store.write(["ann", "gone"], [[30, 31], [6]], expected_lengths=[9, 0])
    same(store, HISTORIES | {"ann": [*range(9), 30, 31], "gone": [6]})
    store.close()
    with pytest.raises(ValueError, match="new has 4 streams: name a new database"):
        import_streams(TASK, PARAMS, folder, tmp_path / "new")


def test_the_command_copies_once(tmp_path, folder, monkeypatch, caplog):
    monkeypatch.setattr(old_files, "open_model", lambda _: Mock(task=TASK, params=PARAMS))
    given = SimpleNamespace(workdir="runs/xlong", folder=str(folder), store=str(tmp_path / "new"))
    monkeypatch.setattr(old_files.flags, "FLAGS", given)
    assert old_files.main([]) == 0 and "new: 3 streams were copied" in caplog.text
    assert old_files.main([]) == 1 and "has 3 streams: name a new database" in caplog.text
    given.store = ""
    assert old_files.main([]) == 1 and "give --workdir of the model" in caplog.text


def test_an_old_folder_is_not_opened_as_a_database(folder):
    message = "in files of an earlier version: python -m rmjax.import_streams copies them"
    with pytest.raises(ValueError, match=message):
        streams(store=folder)


def test_the_digest_of_the_fixture_is_checked(tmp_path, folder):
    file = folder / "index.json"
    index = json.loads((ROOT / "tests" / "fixtures" / "streams" / "index.json").read_text())
    file.write_text(json.dumps(index | {"slots": [2, 0, 3]}))
    with pytest.raises(ValueError, match=r"index\.json: the digest does not fit the content"):
        import_streams(TASK, PARAMS, folder, tmp_path / "new")
    other = jax.tree.map(lambda x: x + 1, PARAMS)
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json holds streams of another model \(machine '"):
        import_streams(TASK, other, folder, tmp_path / "new")
    with pytest.raises(FileNotFoundError, match=r"index\.json does not exist: name a folder"):
        import_streams(TASK, PARAMS, tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def index_with(**values):
    """A change of an index."""
    return lambda index: index.update(values)


HARMS = {
    "two users of one slot": (index_with(slots=[0, 0, 3]), r"slots\[1\] is 0, .*different"),
    "a user twice": (index_with(users=["ann", "ann", 7]), r"users\[1\] is 'ann', .*twice"),
    "a slot below zero": (index_with(slots=[0, -1, 2]), r"slots\[1\] is -1, .*0 \.\. 3"),
    "a slot beyond": (index_with(slots=[0, 1, 10**9]), r"slots\[2\] is 1000000000, .*0 \.\. 3"),
    "no slot": (index_with(slots=[0, None, 2]), r"slots\[1\] is None"),
    "true": (index_with(slots=[0, True, 2]), r"slots\[1\] is True"),
    "a list as a user": (index_with(users=["ann", ["bob"], 7]), r"users\[1\]: .*'bob'.* a list"),
    "fewer slots": (index_with(slots=[0, 1]), "3 users, but 2 slots"),
    "no users": (lambda index: index.pop("users"), "users is missing or is not a list"),
    "capacity": (index_with(capacity=10**9), r"\.bin has \d+ of \d+ bytes"),
    "half a capacity": (
        index_with(capacity=1.5),
        "capacity is 1.5: it must be a whole number, at least 1",
    ),
    "another length": (index_with(segment_length=5), "another model .segment_length 5, this"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_an_edited_index_is_refused_and_the_field_is_named(tmp_path, folder, harm):
    change, message = HARMS[harm]
    file = folder / "index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message) as error:
        import_streams(TASK, PARAMS, folder, tmp_path / "new")
    assert str(folder) in str(error.value)
    assert not (tmp_path / "new").exists()


def test_damaged_files_are_named(tmp_path, folder):
    index, tail = folder / "index.json", folder / "tail.bin"
    text, content = index.read_text(), tail.read_bytes()
    for file, damaged, message in (
        (index, text[:-9].encode(), r"index\.json.* no whole JSON"),
        (index, b"", r"index\.json.* the file is empty"),
        (index, b"[]", r"index\.json.* not an index of streams"),
        (tail, content[:-1], r"tail\.bin has 63 of 64 bytes"),
        (tail, np.full(16, 99, np.int32).tobytes(), "old: user 'ann': tail holds 99, outside"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            import_streams(TASK, PARAMS, folder, tmp_path / "new")
        index.write_text(text)
        tail.write_bytes(content)
    for path in folder.glob("*.bin"):
        kept = path.rename(tmp_path / path.name)
        with pytest.raises(ValueError, match=rf"{path.name} has 0 of \d+ bytes"):
            import_streams(TASK, PARAMS, folder, tmp_path / "new")
        kept.rename(path)
    assert len(list(folder.glob("*.bin"))) == 4
    import_streams(TASK, PARAMS, folder, tmp_path / "new")
    same(streams(store=tmp_path / "new"), HISTORIES)
