"""Runs on texts and videos, from the files to the table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from rmjax import tasks
from rmjax.data import make_source
from rmjax.data.pipeline import eval_batches
from rmjax.run import evaluate, stages, training
from tests.runs import PLAIN, tiny
from tests.small import noise
from tests.test_config_read import FIXTURES, FOLDERS, frames

FAST = PLAIN | {
    "machine.kind": "gru",
    "train.steps": 2,
    "train.save_every": 1,
    "train.eval_every": 2,
    "data.buckets": 1,
}


@pytest.fixture
def card(tmp_path):
    def make(name: str, **changes):
        data = {"data.name": name, "data.dir": str(FIXTURES / FOLDERS.get(name, name))}
        data |= {"data.cache_dir": str(tmp_path / "cache"), "data.segment_length": 15}
        data |= {"data.babi.tasks": "1,3"}
        if name == "activitynet":
            data["data.activitynet.features"] = frames(tmp_path / "frames")
        return tiny(**FAST | data | changes)

    return make


@pytest.mark.parametrize(
    ("name", "measure", "others"),
    [
        ("babi", "test_error", {"under_5%", "qa1", "qa3"}),
        ("narrativeqa", "test_mrr", {"movie"}),
        pytest.param("tvqa", "test_accuracy", set(), marks=pytest.mark.slow),
        ("activitynet", "test_accuracy", {"yes-no"}),
    ],
)
def test_a_run_goes_from_the_files_to_the_table(card, tmp_path, name, measure, others):
    rehearsed = {"rehearsal.recollection": 1.0, "rehearsal.familiarity": 1.0, "teacher.steps": 1}
    changes = rehearsed if name == "activitynet" else {}
    config = card(name, **{"reason.head": "mlp", "data.min_count": 1} | changes)
    rows = training.train(config, tmp_path / "run")
    assert rows[0]["memory"] == "gru" and 0 <= rows[0][measure] <= 1 and others <= rows[0].keys()
    if name == "babi":
        assert training.evaluate_only(config, tmp_path / "run") == rows
    assert measure.replace("test_", "test ").replace("mrr", "MRR") in evaluate.show(rows)
    words = json.loads((tmp_path / "run" / "vocabulary.json").read_text())
    task, params, source = training.trained(tmp_path / "run")
    assert list(source.vocabulary) == words and words[0] == "<unk>"
    if name == "activitynet":
        assert [row["memory"] for row in rows] == ["gru", "question only"]
        assert params["encoder"]["words"]["embed"].shape == (len(words), 8)
        assert params["machine"]["project"].shape == (3, 8)
    else:
        assert params["machine"]["embed"].shape == (len(words), 8)


def test_another_vocabulary_is_refused(card, tmp_path):
    files = Path(shutil.copytree(FIXTURES / "babi", tmp_path / "babi")) / "tasks_1-20_v1-2"
    training.train(card("babi", **{"data.dir": str(files)}), tmp_path / "run")
    for path in files.rglob("qa1_*"):
        path.write_text(path.read_text().replace("mill", "pantry"))
    with pytest.raises(ValueError, match="other words or answers than .*run was trained on"):
        training.train(card("babi", **{"data.dir": str(files)}), tmp_path / "run")
    with pytest.raises(ValueError, match="other words or answers than .*run was trained on"):
        training.trained(tmp_path / "run")


def test_word_vectors_of_a_file_initialise_the_table(card, tmp_path):
    known = {"where": [3.0, 4.0, 0.0], "mill": [0.0, 0.0, 5.0]}
    path = tmp_path / "vectors.txt"
    rows = {**known, "xyz": [1, 1, 1]}.items()
    path.write_text("".join(f"{word} {' '.join(map(str, row))}\n" for word, row in rows))
    config = card("babi", **{"data.vectors": str(path)})
    with training.opened(config, tmp_path / "run") as run:
        state = stages.fresh_state(run, stages.model_stage(run))
    table, words = state.params["machine"]["embed"], list(run.source.vocabulary)
    assert table.shape == (len(words), 3) and state.params["machine"]["project"].shape == (3, 8)
    for word, row in known.items():  # of unit length on average
        np.testing.assert_allclose(table[words.index(word)], np.array(row) / 5, atol=1e-6)
    others = np.delete(table, [words.index(word) for word in known], 0)
    assert (others != 0).all() and len(np.unique(others, axis=0)) == len(others)
    with pytest.raises(ValueError, match="the items of simulated_clicks are no words"):
        tasks.make_task(tiny(**{"data.vectors": str(path)}), make_source(tiny().data, 0))


@pytest.mark.parametrize("kind", ["rehearsal", "gru"])
def test_a_story_written_once_gives_the_answers_of_one_written_per_question(card, kind):
    """Both are bucketed, and compared question by question in the order of the stories."""
    answers = []
    for alone in (False, True):
        changes = {"data.babi.per_question": alone, "data.buckets": 2}
        config = card("babi", **{"machine.kind": kind} | changes)
        source = make_source(config.data, 0)
        task = tasks.make_task(config, source)
        params, scores = noise(task.init), jax.jit(task.scores)
        settings = dict(seed=0, batch_size=2, segment_length=15)
        pairs = {}
        for batch in eval_batches(source, "train", **settings):
            values = np.asarray(scores(params, batch))
            for row, example in enumerate(batch.example_id):
                asked = batch.query_mask[row]
                if asked.any():
                    both = zip(values[row][asked], batch.target[row][asked], strict=True)
                    pairs[int(example)] = list(both)
        stream = source.stream_id("train")
        order = np.argsort(stream, kind="stable")
        answers.append([(stream[i], *pair) for i in order for pair in pairs[i]])
    once, often = answers
    assert len(once) == len(often) > 6
    assert len({v.tobytes() for _, v, _ in once}) > len({s for s, *_ in once})
    for (story, value, target), (other_story, other, other_target) in zip(once, often, strict=True):
        assert (story, target) == (other_story, other_target)
        np.testing.assert_allclose(value, other, atol=1e-5)
