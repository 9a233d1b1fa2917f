"""Generated text has the logits of one pass over the complete text, whatever the model."""

from __future__ import annotations

import functools
import subprocess
import sys

import jax
import numpy as np
import pytest

import rmjax
from rmjax.data.source import Description
from rmjax.data.texts import tokenizers
from rmjax.models.scan import unroll
from rmjax.registry import LANGUAGE_MODELS
from rmjax.run import training
from rmjax.serve import Model, sampling
from rmjax.tasks import make_task
from tests import ROOT
from tests.runs import compilations_kept, tiny
from tests.tasks.test_sequences import SMALL, books

N, KINDS = 6, tuple(LANGUAGE_MODELS)
LONGEST = 11  # segments of the longest text


@pytest.fixture(autouse=True, scope="module")
def compiled(tmp_path_factory):
    with compilations_kept(tmp_path_factory.mktemp("compiled")):
        yield


@functools.cache
def model_of(kind, name="characters", text="abcdefg hij"):
    """A model with random parameters that are large enough for its memory to matter."""
    tokenizer = tokenizers.make_tokenizer(name, [text])
    keys = {"data.name": "books", "data.segment_length": N, "model.kind": kind}
    config = tiny(**SMALL, **keys)
    kept = dict(vocabulary=tuple(tokenizer.vocabulary), tokenizer=tokenizers.packed(tokenizer))
    description = Description(tokenizer.size, endless=True, **kept)
    task = make_task(config, description)
    params = jax.jit(task.init)(jax.random.key(1))
    drawn = np.random.default_rng(0).normal
    noisy = lambda x: x + np.float32(0.4) * drawn(size=x.shape).astype(np.float32)
    return Model(config, task, jax.tree.map(noisy, params), description)


@functools.cache
def _unrolled(model):
    @jax.jit
    def call(params, state, tokens, mask):
        read = lambda hidden, _: model.logits(params, hidden)
        return unroll(model, params, state, tokens, mask, read)[1]

    return call


def logits_of(model, ids):
    """The logits [tokens, V] of one pass over a text, in segments of N tokens."""
    count = LONGEST
    tokens = np.zeros((1, count * N), np.int32)
    tokens[0, : len(ids)] = ids
    mask = np.arange(count * N) < len(ids)
    shape = 1, count, N
    state = model.task.memory(model.params, 1)
    unrolled = _unrolled(model.task.model)
    logits = unrolled(model.params, state, tokens.reshape(shape), mask.reshape(shape))
    return np.asarray(logits).reshape(count * N, -1)[: len(ids)]


def drawn_after(model, rows, tokens, **options):
    """The ids of each text and of the tokens drawn after it."""
    drawn = np.stack(list(sampling.draw(model, rows, tokens, **options)), 1)
    return [np.concatenate(pair) for pair in zip(rows, drawn, strict=True)]


ROWS = [np.array(row) % 12 for row in (range(3), range(40), range(7, 0, -2), [9] * 6, [9] * 7)]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_one_pass_over_the_complete_text(kind):
    """Greedy tokens are the likeliest ones; others are drawn from the same logits."""
    model, tokens = model_of(kind), 3 * N + 2
    key = jax.random.key(5)
    for heat in (0.0, 0.8):
        drawn = drawn_after(model, ROWS, tokens, temperature=heat, seed=5)
        for row, ids in zip(ROWS, drawn, strict=True):
            assert len(ids) == len(row) + tokens and (ids[: len(row)] == row).all()
            logits = logits_of(model, ids)[len(row) - 1 : -1]
            if heat:
                keys = [jax.random.fold_in(key, i) for i in range(len(row), len(ids))]
                noise = np.stack([jax.random.gumbel(k, logits.shape[1:]) for k in keys])
                logits = logits / heat + noise
            np.testing.assert_array_equal(ids[len(row) :], logits.argmax(-1))
        assert not heat or len({tuple(ids[-tokens:]) for ids in drawn}) > 3


def test_a_text_does_not_depend_on_the_prompts_beside_it():
    model = model_of("transformer_xl")
    together = drawn_after(model, ROWS, 9, seed=3)
    for row, ids in zip(ROWS, together, strict=True):
        (alone,) = drawn_after(model, [row], 9, seed=3)
        np.testing.assert_array_equal(alone, ids)
    other = drawn_after(model, ROWS, 9, seed=4)
    assert any((a != b).any() for a, b in zip(together, other, strict=True))


def test_the_nucleus_is_the_smallest_set_of_the_probability():
    logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32) * 2
    logits[3, :] = 1.0
    for top_p in (1e-6, 0.31, 0.91, 1.0):
        kept = np.asarray(sampling.keep_nucleus(logits, np.float32(top_p)))
        for row, ours in zip(logits.astype(np.float64), kept, strict=True):
            probability = np.exp(row) / np.exp(row).sum()
            inside, total = [], 0.0
            for i in sorted(range(50), key=lambda i: (-probability[i], i)):
                if total < top_p - 1e-6 or not inside:
                    inside.append(i)
                total += probability[i]
            assert sorted(np.flatnonzero(np.isfinite(ours))) == sorted(inside)
            np.testing.assert_array_equal(ours[inside], row[inside].astype(np.float32))
    model = model_of("transformer")
    greedy = drawn_after(model, ROWS, 5, temperature=0)
    np.testing.assert_array_equal(
        np.concatenate(drawn_after(model, ROWS, 5, top_p=1e-6, seed=9)), np.concatenate(greedy)
    )


def saved(file, texts):
    """A tokenizer.json of the library, of subwords of bytes."""
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet)
    made.train_from_iterator(texts, trainer)
    made.save(str(file))
    return str(file)


TEXT = "Ünïcode «☃» and 中文, 👍🏽 a small  lamp\n\nthe lamp"


@pytest.mark.parametrize("name", ["bytes", "characters", "words", "file"])
def test_text_comes_piece_by_piece_in_complete_characters(name, tmp_path):
    name = saved(tmp_path / "tokenizer.json", [TEXT]) if name == "file" else name
    tokenizer = tokenizers.make_tokenizer(name, [TEXT])
    ids = tokenizer.encode(TEXT).tolist()
    for start in {1, 3, len(ids) // 2}:
        before = tokenizer.decode(ids[:start])
        if before.endswith("\ufffd"):
            continue
        pieces = list(sampling.decode(tokenizer, ids[:start], ids[start:]))
        assert before + "".join(pieces) == tokenizer.decode(ids)
        assert all(pieces) and "\ufffd" not in "".join(pieces)
        assert len(pieces) > (len(ids) - start) / 3
    if name == "bytes":  # what is no UTF-8 comes out as it does at once
        odd = [*b"a\xe4b\x80\x80c\xf0\x9f"]
        assert "".join(sampling.decode(tokenizer, [97], odd)) == tokenizer.decode(odd)


def test_unknown_parts_of_a_prompt_are_named(tmp_path):
    with pytest.raises(ValueError, match="the prompt has 'x', '☃', which the training texts lack"):
        model_of("transformer").generate("ax☃ax")
    words = model_of("transformer", "words", "one and two")
    with pytest.raises(ValueError, match="the prompt has 'three', which the training texts lack"):
        words.generate("One three two")
    text = words.generate("One, and", tokens=4, seed=2)
    assert text.startswith(" ") and len(text.split()) == 4
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.WordLevel({"one": 0, "?": 1}, unk_token="?"))
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    of_file = tokenizers.make_tokenizer(str(tmp_path / "tokenizer.json"))
    assert of_file.unknown("one two one six") == ["two", "six"]
    assert of_file.unknown("one \udc80") == ["\ufffd"]
    assert of_file.encode("one \ud800").tolist() == [0, 1]
    unigram = library.Tokenizer(library.models.Unigram([("?", 0.0), ("a", -1.0)], 0, False))
    unigram.save(str(tmp_path / "tokenizer.json"))
    assert tokenizers.make_tokenizer(str(tmp_path / "tokenizer.json")).unknown("a☃a") == ["☃"]
    assert tokenizers.Bytes().unknown("☃") == []


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ("", {}, "the prompt '' has no token: give the first words of a text"),
        ([], {}, "no prompt: give the first words"),
        ("a\udc80", {}, "has a lone surrogate at place 1"),
        ("a", {"tokens": 0}, "tokens = 0: must be at least 1"),
        ("a", {"temperature": -1.0}, r"temperature = -1.0: must be at least 0"),
        ("a", {"temperature": float("nan")}, "temperature = nan: must be at least 0"),
        ("a", {"top_p": 0.0}, "top_p = 0.0: must be above 0 and at most 1"),
        ("a", {"top_p": 1.5}, "top_p = 1.5: must be above 0 and at most 1"),
        ("a", {"seed": -1}, "seed = -1: must be from 0"),
    ],
)
def test_errors_name_the_cause(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        model_of("transformer").generate(prompt, **options)


def run_command(*arguments):
    command = [sys.executable, "-m", "rmjax.generate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_command_streams_a_trained_model(tmp_path):
    fast = {"train.steps": 1, "train.eval_every": 1, "train.save_every": 1}
    training.train(books(tmp_path, **fast, **{"model.kind": "transformer"}), tmp_path / "run")
    run = [f"--workdir={tmp_path / 'run'}", "--prompt=one and", "--tokens=20", "--seed=3"]
    run += ["--import=tests.decayed"]  # other tests register this machine, whose key a run keeps
    done = run_command(*run, "--temperature=0.5", "--top_p=0.9")
    assert done.returncode == 0, done.stderr
    model = rmjax.open_model(tmp_path / "run")
    options = dict(tokens=20, temperature=0.5, top_p=0.9, seed=3)
    text = model.generate("one and", **options)
    assert done.stdout == f"one and{text}\n"
    assert "".join(model.stream("one and", **options)) == text
    wrong = run_command(*run, "--top_p=2")
    assert wrong.returncode == 1 and "top_p = 2.0: must be above 0" in wrong.stderr
    shown = run_command("--help").stdout
    assert "--top_p: Draws among the likeliest tokens" in shown and "--workdir: Workdir" in shown
