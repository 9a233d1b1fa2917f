import json
import re
import weakref
from xml.sax.saxutils import escape, quoteattr

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from rmjax.data.pipeline import eval_batches
from rmjax.data.stories.text import tokenize
from rmjax.data.texts.hyperpartisan import (
    ADVICE,
    _articles,
    open_hyperpartisan,
    read_articles,
    read_labels,
)
from rmjax.evaluation import scoring
from rmjax.tools.tables import TABLES
from tests import FIXTURES

FIXTURE = FIXTURES / "hyperpartisan"
NAMES = (
    "articles-training-byarticle-20181122.xml",
    "ground-truth-training-byarticle-20181122.xml",
    "longformer_hp-splits.json",
)
TITLES = [" ".join(["A title of words"] * (i % 3)) for i in range(9)]
BODIES = [" ".join(f"word{j % (5 + i)}" for j in range(i * i)) for i in range(9)]  # 0 to 64 words
PUBLISHED = {
    "train": [3, 0, 1, 2],
    "dev": [5, 4],
    "test": [1, 5, 8, 3],
}  # articles 6 and 7 are in no split
LABELS = ["true" if i in (0, 1, 3, 6) else "false" for i in range(9)]


def write(directory, titles=TITLES, bodies=BODIES, labels=LABELS, splits=PUBLISHED):
    directory.mkdir(exist_ok=True)
    articles = [
        f'<article id="{i:07}" title={quoteattr(title)}>\n<p>{escape(body)}</p></article>\n'
        for i, (title, body) in enumerate(zip(titles, bodies, strict=True))
    ]
    truths = [
        f'<article hyperpartisan="{label}" id="{i:07}" labeled-by="article" url="u"/>\n'
        for i, label in enumerate(labels)
    ]
    head = '<?xml version="1.0" encoding="UTF-8"?>\n'
    (directory / NAMES[0]).write_text(f"{head}<articles>\n{''.join(articles)}</articles>\n")
    (directory / NAMES[1]).write_text(f"{head}<articles>\n{''.join(truths[::-1])}</articles>\n")
    (directory / NAMES[2]).write_text(json.dumps(splits))
    return str(directory)


@pytest.fixture
def directory(tmp_path):
    return write(tmp_path / "data")


def all_of(source, split):
    return source.fetch(split, np.arange(source.size(split)))


def segments(source, split):
    """Yields the segments of each example, as lists of tokens."""
    examples = all_of(source, split)
    for items, mask in zip(examples["items"], examples["item_mask"], strict=True):
        rows = (row[valid] for row, valid in zip(items, mask, strict=True) if valid.any())
        yield [[source.vocabulary[i] for i in row] for row in rows]


def test_the_fixture_word_for_word():
    assert list(read_articles(FIXTURE / NAMES[0])) == [
        (0, "Council & Park", "The council met on Monday. A vote followed."),
        (1, "No date here", "They always lie! Always."),
    ]
    assert read_labels(FIXTURE / NAMES[1]) == {0: 0, 1: 1}
    assert read_labels(FIXTURE / "ground-truth-training-bypublisher-20181122.xml") == {0: 1, 1: 0}


@pytest.mark.parametrize(
    "body, text",
    [
        ("a<p>b</p><p>c</p>d", "a b c d"),
        ("<p>a <p>b</p>c</p>", "a b c"),
        ('x<a href="u">y</a>z', "xyz"),
        ("<p/>a\n\t b&#160;&#10;c ", "a b c"),
        ("a &lt; b &amp;amp; c", "a < b & c"),
        ("c &amp;lt;iframe src=&quot;u&quot;&amp;gt;&amp;lt;/iframe&amp;gt; d", "c d"),
        ("", ""),
    ],
)
def test_html_tags_are_removed_and_white_space_is_one_space(tmp_path, body, text):
    path = tmp_path / "a.xml"
    article = f'<article id="7" published-at="x" title="T">{body}</article>'
    path.write_text(f"<articles>{article}</articles>")
    assert list(read_articles(path)) == [(7, "T", text)]


def test_articles_are_read_one_at_a_time(tmp_path):
    bodies = [f"text {i} " * 999 for i in range(200)]  # some fill a block of the parser
    write(tmp_path / "many", [f"t{i}" for i in range(200)], bodies, LABELS, {})
    path = tmp_path / "many" / NAMES[0]
    expected = [(i, f"t{i}", " ".join(body.split())) for i, body in enumerate(bodies)]
    assert list(read_articles(path)) == expected
    seen = []
    for _, element in _articles(path):
        seen.append(weakref.ref(element))
        assert sum(kept() is not None for kept in seen) < 20


@pytest.mark.parametrize("split, test", [("unseen", [6, 7, 8]), ("published", [1, 5, 8, 3])])
def test_splits(tmp_path, directory, caplog, split, test):
    for _ in range(2):  # prepared, then read back
        caplog.clear()
        source = open_hyperpartisan(directory, str(tmp_path), split=split)
        warning = "of its 4 test articles 2 are in train and 1 in dev"
        assert (warning in caplog.text) == (split == "published")
    assert source.ids == {"train": [3, 0, 1, 2], "valid": [5, 4], "test": test}
    for name, ids in source.ids.items():
        assert source.size(name) == len(ids)
        labels = [source.classes[c] for c in all_of(source, name)["target"][:, 0]]
        assert labels == [LABELS[i] for i in ids]
        # Three of the four articles in 'train' have class 1.
        assert source.references(name)["majority"].tolist() == [[1]] * len(ids)
    assert source.questions[:7] == ("kind", 1, 0, "class", 2, "accuracy", True)
    assert source.positions_at_end
    seen = {*source.ids["train"], *source.ids["valid"]} & {*source.ids["test"]}
    assert seen == (set() if split == "unseen" else {1, 3, 5})


@pytest.mark.parametrize("title", [True, False])
@pytest.mark.parametrize("max_segments", [0, 1, 2])
@pytest.mark.parametrize("segment_length", [3, 7, 512])
def test_segments_are_between_their_marks(tmp_path, directory, segment_length, max_segments, title):
    options = dict(segment_length=segment_length, max_segments=max_segments)
    options |= dict(title=title, min_count=1)
    source = open_hyperpartisan(directory, str(tmp_path), **options)
    for split, ids in source.ids.items():
        examples = all_of(source, split)
        assert examples["items"].shape[2] == segment_length
        assert not examples["items"][~examples["item_mask"]].any()
        assert examples["query"].tolist() == [[0]] * len(ids) == [[0]] * len(examples["query_mask"])
        assert examples["query_mask"].all()
        assert "word_mask" not in examples and "position" not in examples
        for number, cut in zip(ids, segments(source, split), strict=True):
            text = tokenize(f"{TITLES[number]} {BODIES[number]}" if title else BODIES[number])
            text = text[: max_segments * (segment_length - 2)] if max_segments else text
            known = [word if word in source.vocabulary else "<unk>" for word in text]
            assert [word for segment in cut for word in segment[1:-1]] == known
            assert all(segment[0] == "[CLS]" and segment[-1] == "[SEP]" for segment in cut)
            assert all("[CLS]" not in segment[1:] for segment in cut)
            assert all("[SEP]" not in segment[:-1] for segment in cut)
            assert all(len(segment) == segment_length for segment in cut[:-1])
            # An empty article is one segment with the two marks.
            assert len(cut) == max(1, -(-len(text) // (segment_length - 2)))


def test_batches_are_cut_to_their_bucket(tmp_path, directory):
    source = open_hyperpartisan(directory, str(tmp_path), segment_length=7, buckets=3)
    settings = dict(seed=0, batch_size=2, segment_length=7, negatives=4)
    for split, ids in source.ids.items():
        batches = list(eval_batches(source, split, **settings))
        seen = np.concatenate([batch.example_id for batch in batches])
        assert sorted(seen[seen < len(ids)]) == list(range(len(ids)))
        assert {batch.items.shape[1] for batch in batches} <= set(source.buckets(split)[1])
        items = sum(int(batch.item_mask.sum()) for batch in batches)
        assert items == all_of(source, split)["item_mask"].sum()


def test_the_vocabulary_is_the_words_of_the_training_articles(tmp_path, directory):
    source = open_hyperpartisan(directory, str(tmp_path))
    counts = {}
    for number in PUBLISHED["train"]:
        for word in tokenize(f"{TITLES[number]} {BODIES[number]}"):
            counts[word] = counts.get(word, 0) + 1
    frequent = {word for word in counts if counts[word] > 1}
    assert set(source.vocabulary) == frequent | {"<unk>", "[CLS]", "[SEP]"}
    assert source.vocabulary[0] == "<unk>" and source.num_items == len(source.vocabulary)
    assert any("<unk>" in segment for example in segments(source, "test") for segment in example)


@pytest.mark.parametrize("marks", [["[CLS]", "[SEP]"], ["<s>", "</s>"], []])
def test_a_tokenizer_json_keeps_its_ids(tmp_path, directory, marks):
    model, path = ByteLevelBPETokenizer(), tmp_path / "tokenizer.json"
    model.train_from_iterator(BODIES, vocab_size=280, special_tokens=marks)
    model.save(str(path))
    source = open_hyperpartisan(directory, str(tmp_path), tokenizer=str(path), segment_length=9)
    read = Tokenizer.from_file(str(path))
    size = read.get_vocab_size()
    first, last = (read.token_to_id(mark) for mark in marks) if marks else (size, size + 1)
    assert source.num_items == (size if marks else size + 2)
    for split, ids in source.ids.items():
        examples = all_of(source, split)
        for number, items, mask in zip(ids, examples["items"], examples["item_mask"], strict=True):
            tokens = read.encode(f"{TITLES[number]} {BODIES[number]}".strip()).ids
            expected = [[first, *tokens[i : i + 7], last] for i in range(0, max(len(tokens), 1), 7)]
            rows = zip(items, mask, strict=True)
            assert [row[valid].tolist() for row, valid in rows if valid.any()] == expected


def test_data_are_prepared_once_for_each_setting(tmp_path, directory, monkeypatch):
    cache = tmp_path / "cache"
    open_hyperpartisan(directory, str(cache))
    with monkeypatch.context() as patch:
        patch.setattr("rmjax.data.texts.hyperpartisan.read_articles", None)
        open_hyperpartisan(directory, str(cache))
    others = [dict(split="published"), dict(title=False), dict(segment_length=9)]
    others += [dict(max_segments=3), dict(min_count=1), dict(tokenizer="characters")]
    for number, options in enumerate(others, 2):
        open_hyperpartisan(directory, str(cache), **options)
        assert len(list((cache / "hyperpartisan").iterdir())) == number


def fails(tmp_path, says, error=ValueError, **options):
    cache = tmp_path / "cache"
    with pytest.raises(error) as raised:
        open_hyperpartisan(str(tmp_path / "data"), str(cache), **options)
    assert says in str(raised.value) and not [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", NAMES[:2])
def test_damaged_xml_is_named(tmp_path, directory, name):
    path = tmp_path / "data" / name
    text = path.read_text()
    lines = text.splitlines(True)
    path.write_text("".join(lines[:5]) + lines[5][:20])
    fails(tmp_path, f"{path}, line 6: cut short, or not XML (")
    path.write_text("")
    fails(tmp_path, f"{path}, line 1: cut short, or not XML (no element found")
    path.write_text(text.replace("</articles>\n", ""))
    fails(tmp_path, f"{path}, line {len(lines)}: cut short, or not XML (")
    for wrong in ('id="x"', "", 'id="0000001"'):
        path.write_text(text.replace('id="0000002"', wrong))
        assert path.read_text() != text
        actual = wrong[4:-1] if wrong else ""
        fails(tmp_path, f"id: expected a unique number, found {actual!r}")


def test_labels_and_splits_that_do_not_fit_are_named(tmp_path, directory):
    labels, splits = (tmp_path / "data" / name for name in NAMES[1:])
    text = labels.read_text()
    label = 'hyperpartisan="{}" id="0000003"'
    labels.write_text(text.replace(label.format("true"), label.format("maybe")))
    assert labels.read_text() != text
    place = f"{labels}, article 0000003, hyperpartisan"
    fails(tmp_path, f"{place}: expected 'true' or 'false', found 'maybe'")
    labels.write_text(re.sub(r"<article [^>]*0000004[^>]*/>\n", "", text))
    fails(tmp_path, f"{NAMES[0]}: article 0000004 has no label in {labels}")
    labels.write_text(text)
    splits.write_text(json.dumps(PUBLISHED | {"dev": [4, 12, 10]}))
    articles = tmp_path / "data" / NAMES[0]
    fails(tmp_path, f"{splits}: 2 of its articles, first 10, are not in {articles}")
    no_test, no_id = '{"train": [1], "dev": [2]}', '{"train": ["x"], "dev": [2], "test": [3]}'
    for wrong in ("{", "[]", no_test, no_id):
        splits.write_text(wrong)
        fails(tmp_path, f"{splits}: expected lists of ids 'train', 'dev' and 'test' (")
    splits.write_text(json.dumps(PUBLISHED | {"train": [0, 1, 2, 3, 6, 7, 8]}))
    fails(tmp_path, f"{splits}: no article is left for 'test', split='unseen'")
    splits.write_text(json.dumps(PUBLISHED | {"dev": []}))
    says = f"{splits}: no article is left for 'valid', split='published'"
    fails(tmp_path, says, split="published")


def test_results_have_the_measures_of_the_paper(tmp_path, directory):
    """Only 6 of the unseen articles 6, 7 and 8 is hyperpartisan. The reader chooses 6 and 7."""
    source = open_hyperpartisan(directory, str(tmp_path))
    assert source.ids["test"] == [6, 7, 8] and source.classes == ["false", "true"]
    scored = {"scores": np.eye(2)[[[1], [1], [0]]], "target": all_of(source, "test")["target"]}
    scored |= {"query_mask": np.ones((3, 1), bool), "example_id": np.arange(3)}
    reader, majority = scoring.rows(source, "test", "BERT", scored, np.arange(3), 0)
    assert reader["test_accuracy"] == pytest.approx(2 / 3)
    assert reader["macro_f1"] == pytest.approx(2 / 3)
    assert majority["memory"] == "majority" and majority["test_accuracy"] == pytest.approx(1 / 3)
    for row in TABLES["mem3"].rows.values():
        assert row.paper["hyperpartisan"].keys() <= reader.keys()


def test_options_out_of_range_are_refused(tmp_path, directory):
    says = "segment_length=2, max_segments=0: expected 3 or more and 0 or more"
    fails(tmp_path, says, segment_length=2)
    fails(tmp_path, "max_segments=-1: expected 3 or more and 0 or more", max_segments=-1)
    fails(tmp_path, "split='leaked': expected 'unseen' or 'published'", split="leaked")
    fails(tmp_path, "tokenizer='bert': expected 'bytes', ", FileNotFoundError, tokenizer="bert")


@pytest.mark.parametrize("name, pattern", list(zip(NAMES, ADVICE, strict=True)))
def test_a_missing_file_says_where_it_comes_from(tmp_path, directory, name, pattern):
    (tmp_path / "data" / name).unlink()
    fails(tmp_path, f"{pattern} not found in {directory}. {ADVICE[pattern]}", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="not found in data.dir, which is empty"):
        open_hyperpartisan("", str(tmp_path))


@pytest.mark.parametrize("encoding", ["gb2312", "nonsense", "utf-7"])
def test_an_unknown_encoding_of_xml_is_refused(tmp_path, directory, encoding):
    path = tmp_path / "data" / NAMES[0]
    path.write_text(path.read_text().replace('encoding="UTF-8"', f'encoding="{encoding}"'))
    with pytest.raises(ValueError, match=re.escape(f"{path}")) as error:
        open_hyperpartisan(directory, str(tmp_path / "cache"))
    causes = ("save the file as UTF-8", "line 1: cut short, or not XML")
    assert any(cause in str(error.value) for cause in causes)


def test_xml_in_utf_16_and_splits_with_a_byte_order_mark_are_read(tmp_path, directory):
    texts = list(read_articles(tmp_path / "data" / NAMES[0]))
    for name in NAMES[:2]:
        path = tmp_path / "data" / name
        path.write_bytes(path.read_text().replace('"UTF-8"', '"UTF-16"').encode("utf-16"))
    assert list(read_articles(tmp_path / "data" / NAMES[0])) == texts
    splits = tmp_path / "data" / NAMES[2]
    splits.write_text("\ufeff" + splits.read_text() + "\n\n")
    (tmp_path / "data" / f"._{NAMES[2]}").write_text("Mac OS X")
    (tmp_path / "data" / f"._z{NAMES[2]}").write_text("Mac OS X")
    assert open_hyperpartisan(directory, str(tmp_path / "cache")).ids["train"] == PUBLISHED["train"]


@pytest.mark.parametrize(
    "wrong",
    ["[" * 99_999, "1" * 5000, "1e999", "1.5", "true", '"' + "1" * 5000 + '"', "{}", "null"],
)
def test_splits_with_wrong_numbers_are_refused(tmp_path, directory, wrong):
    splits = tmp_path / "data" / NAMES[2]
    splits.write_text(f'{{"train": [0, {wrong}], "dev": [2], "test": [3]}}')
    fails(tmp_path, f"{splits}: expected lists of ids 'train', 'dev' and 'test' (")


def test_long_ids_are_refused_and_deep_xml_is_read(tmp_path, directory):
    path = tmp_path / "data" / NAMES[0]
    text = path.read_text()
    for number in ("1" * 5000, str(2**63)):
        path.write_text(text.replace('id="0000002"', f'id="{number}"'))
        fails(tmp_path, f"{path}, article 3, id: expected a unique number, found '{number[:60]}'")
    path.write_text(text.replace("<p>", "<p>" * 20_000, 1).replace("</p>", "</p>" * 20_000, 1))
    assert len(list(read_articles(path))) == len(BODIES)
