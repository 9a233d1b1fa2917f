import json
import random

import numpy as np
import pytest

from rmjax.data.stories.babi import open_babi
from rmjax.data.stories.jsonl import ADVICE, open_stories
from rmjax.data.stories.text import split_text
from tests import FIXTURES
from tests.data.stories.test_babi import TASKS, every, raw, text_of, words

FIXTURE = FIXTURES / "stories"
SPLITS = ("train", "valid", "test")


@pytest.fixture
def opened(tmp_path):
    """Writes {split: stories} and opens them."""

    def write_and_open(**splits):
        options = splits.pop("options", {})
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        for name, stories in splits.items():
            (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(s)}\n" for s in stories))
        return open_stories(str(folder), str(tmp_path / "cache"), **{"min_count": 1} | options)

    return write_and_open


def story(sentences, *questions):
    return {"story": sentences, "questions": [dict(question) for question in questions]}


def ask(question="Where is Ann?", answer="mill", **more):
    return {"question": question, "answer": answer, **more}


def test_one_story_word_for_word(tmp_path):
    source = open_stories(str(FIXTURE), str(tmp_path), segment_length=9, min_count=1)
    lines = [json.loads(line) for line in (FIXTURE / "train.jsonl").read_text().splitlines()]
    example = {name: values[0] for name, values in every(source, "train").items()}
    segments = text_of(source, example["items"], example["item_mask"])
    assert [" ".join(segment) for segment in segments] == [
        "ann went to the mill",
        "bo took the lamp there and he put it",
        "on the old shelf",
        "ann is not at the mill",
    ]
    questions = text_of(source, example["query"], example["word_mask"])
    assert questions == [words(asked["question"]) for asked in lines[0]["questions"]]
    assert example["position"].tolist() == [1, 4]
    assert [source.classes[i] for i in example["target"]] == ["mill", "on the shelf"]
    text = every(source, "train")["items"][1], every(source, "train")["item_mask"][1]
    assert [" ".join(s) for s in text_of(source, *text)] == [
        "cy opened the barn", "come in", "he said", "ann came in",
    ]  # fmt: skip
    assert source.classes == ["mill", "on the shelf", "barn"] and not source.positions_at_end
    assert source.questions[:7] == ("words", 0, 0, "class", 3, "accuracy", False)


def as_lines(stories):
    """bAbI's stories, as `raw` reads them, as stories for JSON lines."""
    return [
        story(
            [" ".join(sentence) for sentence in asked[-1][0]],
            *(ask(" ".join(q), a, after=len(before)) for before, q, a in asked),
        )
        for asked in stories
    ]


def test_babi_as_json_lines_gives_the_same_batches(opened, tmp_path):
    three = raw("en-10k/qa3_three-supporting-facts_train.PARTIAL-3.txt")
    eight = raw("en-10k/qa8_lists-sets_train.txt")
    tests = ("en-10k/qa3_three-supporting-facts_test.txt", "en-10k/qa8_lists-sets_test.txt")
    stories = {
        "train": raw("en-valid-10k/qa1_train.txt") + three[:-1] + eight[:-1],
        "valid": raw("en-valid-10k/qa1_valid.txt") + three[-1:] + eight[-1:],
        "test": raw("en-valid-10k/qa1_test.txt") + raw(tests[0]) + raw(tests[1]),
    }
    ours = opened(
        **{split: as_lines(part) for split, part in stories.items()},
        options=dict(segment_length=4, max_sentences=5),
    )
    babi = open_babi(
        str(FIXTURES / "babi"), str(tmp_path), tasks=TASKS, segment_length=4, max_sentences=5
    )
    for split in SPLITS:
        mine, theirs = every(ours, split), every(babi, split)
        for name in ("item_mask", "query_mask", "word_mask", "position", "example_id"):
            np.testing.assert_array_equal(mine[name], theirs[name])
        for name, mask in (("items", "item_mask"), ("query", "word_mask")):
            known = set(ours.vocabulary)  # bAbI's has the words of all splits
            words = [babi.vocabulary[i] for i in theirs[name][theirs[mask]]]
            words = [word if word in known else "<unk>" for word in words]
            assert [ours.vocabulary[i] for i in mine[name][mine[mask]]] == words
        answers = [babi.classes[c] for c in theirs["target"][theirs["query_mask"]]]
        classes = [*ours.classes, "another"]
        answers = [answer if answer in ours.classes else "another" for answer in answers]
        assert [classes[c] for c in mine["target"][mine["query_mask"]]] == answers
        np.testing.assert_array_equal(ours.buckets(split)[0], babi.buckets(split)[0])


def test_choices_are_candidates(opened):
    asked = [
        ask("Who came?", "Ann", choices=["Bo ", "Ann", "the cook"]),
        ask("Who left?", "the cook", choices=["the cook", "Cy"]),
    ]
    part = [story(["Ann came."], *asked)]
    source = opened(train=part, valid=part, test=part)
    assert source.questions.answer == "choice" and source.classes == [] and source.positions_at_end
    example = {name: values[0] for name, values in every(source, "train").items()}
    assert "position" not in example and example["target"].tolist() == [1, 0]
    pool = [" ".join(c) for c in text_of(source, example["candidates"], example["candidate_mask"])]
    for row, question in enumerate(asked):
        chosen = example["choices"][row][example["choice_mask"][row]]
        assert [pool[c] for c in chosen] == [c.strip().lower() for c in question["choices"]]


def test_questions_are_put_in_the_order_of_the_story(opened):
    part = [story(["Ann came.", "Bo left."], ask("Who left?", "Bo"), ask("Who?", "Ann", after=0))]
    source = opened(train=part, valid=part, test=part)
    example = every(source, "train")
    assert example["position"].tolist() == [[0, 2]]
    assert [source.classes[c] for c in example["target"][0]] == ["Ann", "Bo"]


def test_the_log_has_the_file_of_each_split_and_warns_of_large_shares(opened, caplog):
    many = [story([f"Ann saw {i}."], ask()) for i in range(20)]
    with caplog.at_level("INFO"):
        opened(train=many, test=many[:9])
        assert "train: 18 stories with 18 questions, from train.jsonl." in caplog.text
        assert "valid: 2 stories with 2 questions, drawn from train.jsonl." in caplog.text
        assert "test: 9 stories with 9 questions, from test.jsonl." in caplog.text
        assert "takes" not in caplog.text
        opened(train=many[:4], test=many[:9])
    assert "stories: valid takes 25%, not 10% (config.data.stories.valid_fraction)" in caplog.text


def test_answers_that_training_lacks_count_as_wrong(opened, caplog):
    train, other = [story(["Ann came."], ask())], [story(["Ann came."], ask(answer="loft"), ask())]
    source = opened(train=train, valid=train, test=other)
    assert every(source, "test")["target"].tolist() == [[1, 0]] and source.classes == ["mill"]
    message = "test: the answers to 1 of 2 questions are not among the 1 of the training stories"
    assert message in caplog.text and "valid: the answers" not in caplog.text


def firsts(source, split):
    """The first word of each story."""
    examples = every(source, split)
    return [source.vocabulary[i] for i in examples["items"][:, 0, 0]]


@pytest.mark.parametrize("files, sizes", [((), (28, 8, 4)), (("test",), (32, 8, 1))])
def test_splits_without_a_file_are_drawn_by_a_hash_of_the_story(opened, tmp_path, files, sizes):
    stories = [story([f"word{i // 2} came."], ask(f"Is it {i}?", "mill")) for i in range(40)]
    more = {name: stories[:1] for name in files}
    options = dict(valid_fraction=0.2, test_fraction=0.1)
    source = opened(train=stories, **more, options=options)
    assert tuple(source.size(split) for split in SPLITS) == sizes
    trained = set(firsts(source, "train"))
    assert len(trained) == sizes[0] / 2  # both of two equal stories
    random.Random(0).shuffle(stories)
    assert set(firsts(opened(train=stories, **more, options=options), "train")) == trained
    more_stories = [story(["A word came."], ask()), *stories]
    grown = set(firsts(opened(train=more_stories, **more, options=options), "train"))
    assert len(trained - grown) <= 1
    seeded = opened(train=stories, **more, options=options | {"seed": 1})
    assert set(firsts(seeded, "train")) != trained
    if not files:
        alone = (tmp_path / "data" / "train.jsonl").rename(tmp_path / "alone.jsonl")
        one = open_stories(str(alone), str(tmp_path / "cache"), min_count=1, **options)
        assert set(firsts(one, "train")) == trained


GOOD = story(["Ann came.", "Bo left."], ask(after=1))
CHOSEN = story(["Ann came."], ask(choices=["mill", "barn"]))
FIELD = "questions[0]"


def changed(**changes):
    return story(GOOD["story"], GOOD["questions"][0] | changes)


WRONG = [  # (stories, line, field, expected, part of the value)
    ([GOOD, '{"story": ["a"]'], 2, "line", "JSON (Expecting ',' delimiter)", '{"story"'),
    ([GOOD, "[]"], 2, "line", "a JSON object", "[]"),
    ([GOOD, "", GOOD], 2, "line", "JSON (Expecting value)", ""),
    ([], 1, "line", "a story", "an empty file"),
    ([{"questions": [ask()]}], 1, "story", "a text, or a list of one sentence", "null"),
    ([story([], ask())], 1, "story", "a text, or a list of one sentence or more", "[]"),
    ([story("...", ask())], 1, "story", "a text with words", "..."),
    ([story(["Ann came.", "?"], ask())], 1, "story[1]", "a sentence with words", "?"),
    ([story(["Ann came.", 7], ask())], 1, "story[1]", "a sentence with words", "7"),
    ([GOOD, {"story": "Ann came."}], 2, "questions", "a list of one question", "no such key"),
    ([story("Ann came.")], 1, "questions", "a list of one question or more", "[]"),
    ([{"story": "Ann came.", "questions": ["Who?"]}], 1, FIELD, "an object with", "Who?"),
    ([GOOD | {"question": []}], 1, "question", "this key in an entry of 'questions'", "[]"),
    ([GOOD | {"choices": ["a"]}], 1, "choices", "this key in an entry of 'questions'", '["a"]'),
    ([changed(story="a")], 1, f"{FIELD}.story", "this key in the object of the story", "a"),
    ([{"story": "Ann came.", "question_s": []}], 1, "question_s", "another name: did you", "_s"),
    ([changed(question=None)], 1, f"{FIELD}.question", "a string", "null"),
    ([changed(question="?")], 1, f"{FIELD}.question", "a sentence with words", "?"),
    ([changed(answer=3)], 1, f"{FIELD}.answer", "a string", "3"),
    ([changed(answer=" ")], 1, f"{FIELD}.answer", "a text that is not empty", " "),
    ([changed(after=3)], 1, f"{FIELD}.after", "a number of sentences from 0 to 2", "3"),
    ([changed(after=-1)], 1, f"{FIELD}.after", "a number of sentences from 0 to 2", "-1"),
    ([changed(after=True)], 1, f"{FIELD}.after", "a number of sentences", "true"),
    (
        [story("Ann came.", ask(afte=1))],
        1,
        f"{FIELD}.afte",
        "another name: did you mean 'after'?",
        "afte",
    ),
    ([GOOD, CHOSEN], 2, f"{FIELD}.choices", "no choices, as in the first", '["mill", "barn"]'),
    ([CHOSEN, GOOD], 2, f"{FIELD}.choices", "choices, as in the first", "no such key"),
    ([changed(choices=["mill"])], 1, f"{FIELD}.choices", "a list of two strings", '["mill"]'),
    ([changed(choices="mill")], 1, f"{FIELD}.choices", "a list of two strings", "mill"),
    ([changed(choices=["loft", "barn"])], 1, f"{FIELD}.answer", "one of the choices", "mill"),
    ([changed(choices=["mill", "Mill!"])], 1, f"{FIELD}.choices", "choices that differ", "Mill!"),
]


@pytest.mark.parametrize("stories, line, field, expected, value", WRONG)
def test_a_malformed_line_is_named(tmp_path, stories, line, field, expected, value):
    path = tmp_path / "train.jsonl"
    lines = (s if isinstance(s, str) else json.dumps(s) for s in stories)
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ValueError) as error:
        open_stories(str(tmp_path), str(tmp_path / "cache"))
    assert str(error.value).startswith(f"{path}, line {line}, field {field}: expected {expected}")
    assert value in str(error.value).partition(", found ")[2]
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_keys_of_other_programs_are_left_out(opened):
    """A name like that of a key is no slip where the key itself is given."""
    part = [GOOD | {"questions_of": 3} | changed(question_id=7, answer_id=2, answers=["mill"])]
    assert every(opened(train=part, valid=part, test=part), "train")["target"].tolist() == [[0]]


def test_choices_that_become_the_same_ids_are_counted(opened, caplog):
    """'mill' and 'barn' occur once in 'train', so both are '<unk>'; 'loft' occurs twice."""
    rare = [story(["Ann came."], ask("Who?", choices=["mill", "barn"]))]
    known = [story(["Loft loft."], ask("Who?", "loft", choices=["loft", "sea"]))]
    source = opened(train=rare + known, valid=known, test=rare, options={"min_count": 2})
    counts = source.metadata["counts"]
    assert [counts[split]["alike"] for split in SPLITS] == [1, 0, 1]
    assert "test: 1 of 1 questions have choices that the model cannot tell apart" in caplog.text
    assert "valid: 1 of 1" not in caplog.text and "valid: 0 of" not in caplog.text


def test_composed_and_decomposed_answers_are_one_class(opened, caplog):
    part = [story(["Ann came."], ask(answer="caf\u00e9"), ask(answer="cafe\u0301 "))]
    assert opened(train=part, valid=part, test=part).classes == ["caf\u00e9"]
    assert "the same words" not in caplog.text
    part = [story(["Ann came."], *(ask(answer=a) for a in ("Hall", "?", "!", "hall")))]
    assert opened(train=part, valid=part, test=part).classes == ["Hall", "?", "!", "hall"]
    assert "the answers 'Hall' and 'hall' have the same words" in caplog.text


def test_files_that_are_missing_or_have_other_names(opened, tmp_path):
    for directory in ("", str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(FileNotFoundError, match=r"train\.jsonl not found in .*") as error:
            open_stories(directory, str(tmp_path / "cache"))
        assert ADVICE in str(error.value)
    with pytest.raises(ValueError, match=r"dev\.jsonl: the files of a folder are train\.jsonl"):
        opened(train=[GOOD], dev=[GOOD])
    (tmp_path / "data" / "dev.jsonl").unlink()
    message = "1 different stories, and 2 are needed for 'valid' and 'test': add stories"
    with pytest.raises(ValueError, match=message):
        opened(train=[GOOD, GOOD])


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("Ann came. Bo left!  Why?\nCy", ["Ann came.", "Bo left!", "Why?", "Cy"]),
        ('He said "Go!" and (well...) went.', ['He said "Go!', "and (well...", "went."]),
        ("It is 3.5 km.", ["It is 3.5 km."]),
        ("One line\nof a verse\n\n* * *\n\nEnd", ["One line\nof a verse", "End"]),
        ("他走了。她来了？好", ["他走了。", "她来了？", "好"]),
        ("...", []),
    ],
)  # fmt: skip
def test_a_text_is_split_into_sentences(text, sentences):
    assert [part.strip() for part in split_text(text)] == sentences
