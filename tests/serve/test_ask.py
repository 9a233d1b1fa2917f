"""A trained model answers questions in words, as evaluation answers them."""

from __future__ import annotations

import csv
import json

import jax
import numpy as np
import pytest

import rmjax
from rmjax import tasks
from rmjax.data import describe, make_source
from rmjax.data.pipeline import eval_batches
from rmjax.data.source import Description
from rmjax.run import training
from rmjax.serve import Model
from tests import FIXTURES
from tests.data.stories.test_babi import text_of, words
from tests.runs import PLAIN, compilations_kept, tiny


@pytest.fixture(autouse=True, scope="module")
def compiled(tmp_path_factory):
    with compilations_kept(tmp_path_factory.mktemp("compiled")):
        yield


def config_of(folder, name, directory, **changes):
    data = {"data.name": name, "data.dir": str(directory), "data.cache_dir": str(folder / "cache")}
    return tiny(**PLAIN | data | {"reason.head": "mlp", "data.min_count": 1} | changes)


def untrained(folder, name, directory, **changes):
    """A model with random parameters, as `open_model` makes it, and the source."""
    config = config_of(folder, name, directory, **changes)
    source = make_source(config.data, config.data.seed)
    kept = json.loads(json.dumps(describe(config.data, source).as_json()))
    description = Description.from_json(kept)
    task = tasks.make_task(config, description)
    return Model(config, task, jax.jit(task.init)(jax.random.key(0)), description), source


def offline(model, source, split="test"):
    """(example, its scores [Q, C]) of each example of a split."""
    length = model.config.data.segment_length
    sizes = {"batch_size": 4, "segment_length": length, "negatives": 8}
    for batch in eval_batches(source, split, seed=0, **sizes):
        scores = np.asarray(model.scores(model.params, batch))
        for row in np.flatnonzero(batch.query_mask.any(1)):
            pick = lambda x, row=row: None if x is None else np.asarray(x)[row]
            yield {name: pick(value) for name, value in vars(batch).items()}, scores[row]


def softmax(x):
    odds = np.exp(np.asarray(x, np.float64))
    return odds / odds.sum()


def assert_reply(reply, names, expected):
    """Compares a reply with the probabilities of the names."""
    ours = {answer.answer: answer.probability for answer in reply.answers}
    np.testing.assert_allclose([ours[name] for name in names], expected, rtol=1e-5)
    assert list(ours.values()) == sorted(ours.values(), reverse=True)


BABI = {"data.segment_length": 20, "data.babi": dict(max_sentences=3, tasks="1,3,8")}


@pytest.mark.parametrize("name, keys, split", [("babi", BABI, "test"), ("stories", {}, "train")])
def test_classes_are_those_of_evaluation(tmp_path, name, keys, split):
    model, source = untrained(tmp_path, name, FIXTURES / name, **{"data.buckets": 1} | keys)
    count = 0
    for example, scores in offline(model, source, split):
        for q in np.flatnonzero(example["query_mask"]):
            before = example["items"][: example["position"][q]]
            if not len(before):
                continue
            kept = example["item_mask"][: len(before)]
            story = [" ".join(part) for part in text_of(source, before, kept)]
            (asked,) = text_of(source, *(example[n][q : q + 1] for n in ("query", "word_mask")))
            if "<unk>" in " ".join([*story, *asked]):
                continue
            count += 1
            if name == "babi" and len(story) == 3:  # a model reads the last sentences only
                story = [story[1], *story]
            text = story if q % 2 else ". ".join(story) + "! "
            reply = model.ask(text, f"{' '.join(asked)}?", k=99)
            assert_reply(reply, source.classes, softmax(scores[q]))
            assert reply.unknown == ()
            (some,) = model.ask(story, [reply.question], choices=source.classes[:2])
            assert_reply(some, source.classes[:2], softmax(scores[q, :2]))
            assert model.ask(story, reply.question, k=1).answers == reply.answers[:1]
    assert count > 1


def test_choices_of_narrativeqa_are_those_of_evaluation(tmp_path):
    model, source = untrained(tmp_path, "narrativeqa", FIXTURES / "narrativeqa", **{
        "data.segment_length": 5, "data.narrativeqa.max_segments": 1})  # fmt: skip
    rows = lambda name: csv.DictReader((FIXTURES / "narrativeqa" / name).open(newline=""))
    sets = {row["document_id"]: row["set"] for row in rows("documents.csv")}
    stories = {
        row["document_id"]: row["summary_tokenized"]
        for row in rows("third_party/wikipedia/summaries.csv")
    }
    asked = {}
    for row in rows("qaps.csv"):
        if sets[row["document_id"]] == "train":
            asked.setdefault(row["document_id"], []).append(row)
    pairs = list(zip(asked.items(), offline(model, source, "train"), strict=True))
    assert any(len(questions) > 1 for _, questions in asked.items())
    for (document, questions), (_, scores) in pairs:
        pool = {}  # answers of equal words are one candidate
        for row in questions:
            pool.setdefault(tuple(words(row["answer1_tokenized"])), row["answer1_tokenized"])
        choices = list(pool.values())
        texts = [row["question_tokenized"] for row in questions]
        for q, reply in enumerate(model.ask(stories[document], texts, choices, k=99)):
            assert_reply(reply, choices, softmax(scores[q, : len(choices)]))
    with pytest.raises(ValueError, match="chooses among the answers it is given: give choices"):
        model.ask("a story", "who?")
    with pytest.raises(ValueError, match="the choices 'a mill' and 'A mill!' have the same words"):
        model.ask("a story", "who?", ["a mill", "a barn", "A mill!"])


def test_choices_of_tvqa_are_those_of_evaluation(tmp_path):
    model, source = untrained(tmp_path, "tvqa", FIXTURES / "tvqa", **{
        "data.segment_length": 4, "data.tvqa.max_words": 3})  # fmt: skip
    read = lambda name: [json.loads(line) for line in (FIXTURES / "tvqa" / name).open()]
    subtitles = {row["vid_name"]: row["sub"] for row in read("tvqa_preprocessed_subtitles.jsonl")}
    asked = {}
    for row in read("tvqa_val.jsonl"):
        asked.setdefault(row["vid_name"], []).append(row)
    count = 0
    for (clip, rows), (_, scores) in zip(asked.items(), offline(model, source), strict=True):
        story = [line["text"] for line in subtitles[clip] if line["text"]]
        for q, row in enumerate(rows):
            choices = [row[f"a{i}"] for i in range(5)]
            assert_reply(model.ask(story, row["q"], choices), choices, softmax(scores[q]))
            count += 1
    assert count > 1


PEOPLE, PLACES = ("Ann", "Bo", "Cy"), ("mill", "barn", "loft")


def world(rng, sentences):
    """A story of people who walk, and one question about each of them."""
    story, places = [], {}
    for person in (*PEOPLE, *rng.choice(PEOPLE, sentences)):
        places[str(person)] = str(rng.choice(PLACES))
        story.append(f"{person} went to the {places[str(person)]}.")
    asked = [{"question": f"Where is {who}?", "answer": place} for who, place in places.items()]
    return {"story": story, "questions": asked}


@pytest.fixture(scope="module")
def walkers(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("walkers"), np.random.default_rng(0)
    stories = [world(rng, i % 3) for i in range(400)]
    (folder / "walks.jsonl").write_text("".join(json.dumps(one) + "\n" for one in stories))
    keys = {"machine.kind": "multihop_reason", "machine.dim": 32, "data.segment_length": 5,
            "data.buckets": 1, "train.batch_size": 32, "train.learning_rate": 1e-2,
            "train.steps": 100, "train.eval_every": 100, "train.save_every": 100}  # fmt: skip
    training.train(config_of(folder, "stories", folder / "walks.jsonl", **keys), folder / "run")
    (folder / "walks.jsonl").unlink()
    return rmjax.open_model(folder / "run")


def test_a_world_of_one_s_own_is_learned_and_asked_in_words(walkers):
    story = ["Ann went to the mill.", "Bo went to the barn.", "Cy went to the loft."]
    replies = walkers.ask([*story, "Ann went to the barn."], [f"Where is {p}?" for p in PEOPLE])
    assert [reply.answers[0].answer for reply in replies] == ["barn", "barn", "loft"]
    assert all(reply.answers[0].probability > 0.8 for reply in replies)
    np.testing.assert_allclose([sum(a.probability for a in r.answers) for r in replies], 1.0)
    (reply,) = walkers.ask("Bo went to the mill, quietly! Ann sang.", ["Where is Bo now?"])
    assert reply.unknown == ("quietly", "sang", "now")
    assert walkers.ask(story, "Where is Cy?").answers[0].answer == "loft"


@pytest.mark.parametrize(
    "story, question, options, message",
    [
        ("...", "Where is Ann?", {}, "the story '...' has no words: give a text, or a list"),
        ([], "Where is Ann?", {}, "has no words"),
        (["Ann", 3], "Where?", {}, "story has 3 in it: give a text, or a list of texts"),
        ("Ann went.", "?", {}, "a question without words: '?'"),
        ("Ann went.", [], {}, "give a question"),
        ("Ann went.", "Where?", {"k": 0}, "k = 0: must be at least 1"),
        ("Ann went.", "Where?", {"choices": ["sea"]}, "'sea' is no answer of this model, such as"),
        ("Ann went.", "Where?", {"choices": ["mill", "mill"]}, "'mill' is given twice"),
        ("Ann went.", "Where?", {"choices": []}, "give a list of one answer or more"),
        ("Ann went.", "Where?", {"choices": "mill"}, "give a list of one answer or more"),
    ],
)
def test_errors_name_the_cause(walkers, story, question, options, message):
    with pytest.raises(ValueError, match=message.replace("...", r"\.\.\.").replace("?", r"\?")):
        walkers.ask(story, question, **options)
