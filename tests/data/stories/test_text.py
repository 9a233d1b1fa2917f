import itertools
import math
import pickle
import random
import unicodedata
from collections import Counter

import numpy as np
import pytest

from rmjax.data import records
from rmjax.data.stories.text import (
    Story,
    TextBuilder,
    TextRecords,
    bucket_boundaries,
    fold,
    make_vocabulary,
    tokenize,
)

WORDS = [f"w{i}" for i in range(7)]


class MadeBuilder(TextBuilder):
    """Random stories; some have no sentence, and some candidates have no word."""

    name = "made"
    fields = (*TextBuilder.fields, "group", "also", *TextBuilder.choice_fields)

    def stories(self):
        self.info.metadata.update(groups=["even", "odd"])
        return made_stories()


def made_stories():
    rng = np.random.default_rng(0)

    def sentences(least, most, longest, shortest=1):
        lengths = (rng.integers(shortest, longest + 1) for _ in range(rng.integers(least, most)))
        return [list(rng.choice(WORDS, length)) for length in lengths]

    def story():
        text, asked = sentences(0, 6, 9), sentences(1, 5, 4)
        answers = sentences(3, 7, 3, shortest=0)
        position = sorted(int(p) for p in rng.integers(0, len(text) + 1, len(asked)))
        choices = [rng.permutation(len(answers))[: rng.integers(2, 4)].tolist() for _ in asked]
        kinds = rng.integers(0, 2, (2, len(asked)))
        groups, target = kinds[1].tolist(), kinds[0].tolist()
        return Story(text, asked, position, target, groups, kinds[0] - 1, answers, choices)

    sizes = dict(train=30, valid=5, test=9)
    return {split: [story() for _ in range(size)] for split, size in sizes.items()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("made")
    (path / "file").write_text("")
    files, parameters = (path / "file",), dict(min_count=1)
    return records.prepare(MadeBuilder, str(path / "cache"), files=files, parameters=parameters)


def open_made(directory, **options):
    options = dict(segment_length=4, metric="mrr", positions_at_end=False) | options
    return TextRecords(directory, **options)


def test_tokenize():
    text = (
        "Don't PANIC, it\u2019s 4.5 \"e-mails\": the boys' café\n"
        "(no. 42) 'tis rock'n'roll a_b -- ..."
    )
    words = "don't panic it's 4 5 e mails the boys café no 42 tis rock'n'roll a b"
    assert " ".join(tokenize(text)) == words
    assert tokenize("?!") == [] == tokenize("")


HINDI = "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902"
HEBREW = "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd"  # with its points
ARABIC = "\u0643\u0650\u062a\u064e\u0627\u0628\u064c"  # with its vowels
PERSIAN = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"  # with a joiner
TAMIL = ("\u0ba4\u0bae\u0bbf\u0bb4\u0bcd", "\u0ba8\u0bbe\u0b9f\u0bc1")
SCRIPTS = [  # (text, words)
    ("\u0130stanbul D\u0130YARBAKIR I\u0307zmir", "istanbul diyarbakir izmir"),  # Turkish
    (HINDI, HINDI),
    (", ".join(TAMIL), " ".join(TAMIL)),
    (f"{HEBREW}.", HEBREW),
    (f"{ARABIC}!", ARABIC),
    (PERSIAN, PERSIAN),
    ("cafe\u0301 caf\u00e9 Ame\u0301lie", "caf\u00e9 caf\u00e9 am\u00e9lie"),
    ("J\u030c", "\u01f0"),  # is a single character in lower case only
    ("Zeit\u00adung l\u2019\u00e9t\u00e9 snake_\u00e9", "zeitung l'\u00e9t\u00e9 snake \u00e9"),
    ("\u0301 \u200d \u2603\ufe0f 3\u00e9", "3\u00e9"),  # marks alone are no word
    ("\u4e2d\u6587 \u00bd", "\u4e2d\u6587 \u00bd"),
]


@pytest.mark.parametrize("text, words", SCRIPTS)
def test_words_of_every_script_stay_complete(text, words):
    for form in ("NFC", "NFD"):
        normal = [unicodedata.normalize("NFC", word) for word in words.split()]
        assert tokenize(unicodedata.normalize(form, text)) == normal


def test_tokenizing_a_word_again_changes_nothing():
    """Random characters: a word is one word again, and equal texts have equal words."""
    draw = random.Random(0)
    letters = (*range(0x20, 0x600), *range(0x900, 0xA00), *range(0x1E00, 0x2030), 0x130)
    alphabet = [chr(c) for c in letters]
    marks = [chr(c) for c in (*range(0x300, 0x330), 0xAD, 0x200C, 0x200D)]
    for _ in range(2000):
        pairs = (draw.choice(alphabet) + draw.choice(marks) * draw.randrange(2) for _ in range(9))
        text = "".join(pairs)
        words = tokenize(text)
        assert [tokenize(word) for word in words] == [[word] for word in words]
        assert [fold(word) for word in words] == words
        assert tokenize(unicodedata.normalize("NFD", text)) == words


def test_vocabulary_by_count_then_alphabet():
    counts = Counter("bacabd")
    assert make_vocabulary(counts) == ["<unk>", "a", "b", "c", "d"]
    assert make_vocabulary(counts + Counter("ddd"), 2) == ["<unk>", "d", "a", "b"]
    assert make_vocabulary(Counter()) == ["<unk>"]


@pytest.mark.parametrize("per_question", [False, True])
@pytest.mark.parametrize("segment_length", [1, 4, 20])
def test_every_word_is_where_it_belongs(directory, segment_length, per_question):
    source = open_made(directory, segment_length=segment_length, per_question=per_question)
    for split, stories in made_stories().items():
        wanted = []  # (number of the story, story, its questions) of every example
        for number, story in enumerate(stories):
            asked = range(len(story.questions))
            for questions in [[q] for q in asked] if per_question else [asked]:
                wanted.append((number, story, questions))
        order = np.random.default_rng(1).permutation(len(wanted))
        examples = source.fetch(split, order)
        assert examples["example_id"].tolist() == order.tolist()
        assert source.size(split) == len(wanted)
        assert source.stream_id(split).tolist() == [number for number, *_ in wanted]
        for row, example in enumerate(order):
            one = {name: values[row] for name, values in examples.items()}
            check_example(source, one, wanted[example], segment_length, per_question)
            check_questions(source, split, example, *wanted[example][1:])


def check_example(source, example, wanted, segment_length, per_question):
    """Compares the arrays of one example with a story and some of its questions."""

    def read(name, mask):
        values, mask = example[name], example[mask]
        assert not values[~mask].any()
        return [row[kept].tolist() for row, kept in zip(values, mask, strict=True)]

    def ids(sentence):
        return [source.vocabulary.index(word) for word in sentence] or [0]

    def segments(sentences):
        starts = ((words, range(0, len(words), segment_length)) for words in sentences)
        return [ids(words[i : i + segment_length]) for words, begins in starts for i in begins]

    _, story, asked = wanted
    text = story.sentences[: story.position[asked[0]]] if per_question else story.sentences
    assert [s for s in read("items", "item_mask") if s] == segments(text)
    assert example["item_mask"][: len(segments(text))].any(-1).all()
    candidates = [ids(s) for s in story.candidates]
    assert [s for s in read("candidates", "candidate_mask") if s] == candidates
    padding = source.num_queries - len(asked)
    none = [[]] * padding
    assert read("query", "word_mask") == [ids(story.questions[q]) for q in asked] + none
    assert read("choices", "choice_mask") == [story.choices[q] for q in asked] + none
    assert example["query_mask"].tolist() == [True] * len(asked) + [False] * padding
    assert example["target"].tolist() == [story.target[q] for q in asked] + [0] * padding
    if per_question:
        assert "position" not in example
    else:
        before = [len(segments(story.sentences[: story.position[q]])) for q in asked]
        assert example["position"].tolist() == before + [0] * padding


def check_questions(source, split, example, story, asked):
    """Compares the second choices and the groups of one example with a story."""
    padding = source.num_queries - len(asked)
    also = source.also(split)[example]
    assert also.tolist() == [story.also[q] for q in asked] + [-1] * padding
    for number, name in enumerate(("even", "odd")):
        expected = [story.group[q] == number for q in asked] + [False] * padding
        assert source.groups(split)[name][example].tolist() == expected


@pytest.mark.parametrize("per_question", [False, True])
@pytest.mark.parametrize("last", [1, 2, 5])
def test_max_sentences_keeps_the_last_sentences(directory, last, per_question):
    source = open_made(directory, max_sentences=last, per_question=per_question)
    row = 0
    for story in made_stories()["train"]:
        for q in range(len(story.questions)) if per_question else (-1,):
            end = story.position[q]
            kept = range(max(end - last, 0), end)
            example = source.fetch("train", np.array([row]))
            items = example["items"][0][example["item_mask"][0]].tolist()
            words = [word for k in kept for word in story.sentences[k]]
            assert items == [source.vocabulary.index(word) for word in words]
            if not per_question:
                segments = {k: -(-len(story.sentences[k]) // 4) for k in kept}
                before = [sum(n for k, n in segments.items() if k < p) for p in story.position]
                assert example["position"][0, : len(before)].tolist() == before
            row += 1


def test_shapes_and_types_are_always_the_same(directory):
    source = open_made(directory)
    stories = [story for split in made_stories().values() for story in split]
    shapes = set()
    for split in ("train", "valid", "test"):
        for rows in ([0], [1, 2], [4, 4, 4]):
            examples = source.fetch(split, np.array(rows))
            shapes.add(tuple((name, x.shape[1:], x.dtype) for name, x in examples.items()))
    assert len(shapes) == 1
    shape = {name: (inner, dtype) for name, inner, dtype in next(iter(shapes))}
    T = max(sum(-(-len(s) // 4) for s in story.sentences) for story in stories)
    Q, W = max(len(s.questions) for s in stories), max(len(q) for s in stories for q in s.questions)
    A = max(len(s.candidates) for s in stories)
    V = max(len(a) for s in stories for a in s.candidates)
    C = max(len(c) for s in stories for c in s.choices)
    assert shape == {
        "items": ((T, 4), np.int32),
        "item_mask": ((T, 4), bool),
        "query": ((Q, W), np.int32),
        "query_mask": ((Q,), bool),
        "word_mask": ((Q, W), bool),
        "target": ((Q,), np.int32),
        "example_id": ((), np.int32),
        "position": ((Q,), np.int32),
        "candidates": ((A, V), np.int32),
        "candidate_mask": ((A, V), bool),
        "choices": ((Q, C), np.int32),
        "choice_mask": ((Q, C), bool),
    }
    assert (source.num_queries, source.num_items) == (Q, len(source.vocabulary))
    assert source.max_items == max(sum(map(len, s.sentences)) for s in stories)
    assert source.questions[:7] == ("words", 0, 0, "choice", 0, "mrr", False)


def test_the_vocabulary_comes_from_the_training_split(directory):
    counts = Counter()
    for story in made_stories()["train"]:
        for sentence in (*story.sentences, *story.questions, *story.candidates):
            counts.update(sentence)
    assert open_made(directory).vocabulary == make_vocabulary(counts)


@pytest.mark.parametrize("number", [1, 2, 3, 6, 99])
def test_buckets_pad_the_least(number):
    rng = np.random.default_rng(number)
    for _ in range(20):
        lengths = rng.integers(1, 12, rng.integers(1, 30))
        longest = int(lengths.max() + rng.integers(0, 3))

        def padded(boundaries, lengths=lengths):
            return sum(min(b for b in boundaries if b >= n) - n for n in lengths)

        boundaries = bucket_boundaries(lengths, longest, number)
        assert boundaries == sorted(set(boundaries)) and boundaries[-1] == longest
        assert len(boundaries) <= number
        others = itertools.combinations(range(1, longest), min(number, longest) - 1)
        assert padded(boundaries) == min(padded((*other, longest)) for other in others)


@pytest.mark.parametrize("number", [1, 2, 3, 6, 99])
def test_buckets_need_the_fewest_cells_in_full_batches(number):
    rng = np.random.default_rng(number)
    for _ in range(20):
        lengths, batch_size = rng.integers(1, 9, rng.integers(1, 30)), int(rng.integers(1, 7))
        longest = int(lengths.max() + rng.integers(0, 3))

        def cells(boundaries, lengths=lengths, batch_size=batch_size):
            sizes = Counter(min(b for b in boundaries if b >= n) for n in lengths)
            return sum(math.ceil(n / batch_size) * batch_size * s for s, n in sizes.items())

        boundaries = bucket_boundaries(lengths, longest, number, batch_size)
        assert boundaries == sorted(set(boundaries)) and boundaries[-1] == longest
        assert len(boundaries) <= number
        others = (itertools.combinations(range(1, longest), k) for k in range(min(number, longest)))
        choices = [(*other, longest) for other in itertools.chain(*others)]
        least = min((cells(choice), len(choice)) for choice in choices)
        assert (cells(boundaries), len(boundaries)) == least


def test_buckets_of_a_source(directory):
    for options in (dict(), dict(per_question=True), dict(buckets=1), dict(buckets=2)):
        source = open_made(directory, **options)
        for split in ("train", "valid", "test"):
            bucket, segments = source.buckets(split)
            mask = source.fetch(split, np.arange(source.size(split)))["item_mask"].any(-1)
            assert segments[-1] == mask.shape[1] and len(segments) <= options.get("buckets", 6)
            upper = np.array(segments)[bucket]
            length = np.maximum(mask.sum(1), 1)
            assert (length <= upper).all() and (length > np.array([0, *segments])[bucket]).all()


def test_a_pickled_source_reads_the_same(directory):
    source = open_made(directory)
    other = pickle.loads(pickle.dumps(source))
    for name, values in source.fetch("test", np.arange(9)).items():
        np.testing.assert_array_equal(values, other.fetch("test", np.arange(9))[name])
