import codecs
import gc
import json
import logging
import re
import shutil
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer, Tokenizer, models

from rmjax.data.texts import corpora, pg19, tokenizers, wikitext
from rmjax.data.texts.tokenizers import make_tokenizer
from rmjax.registry import SOURCES
from tests import FIXTURES
from tests.data.texts.opening import KINDS, advice, documents

SPLITS = ("train", "valid", "test")
TEXT = "One  lamp,\n\n two \u00e9t\u00e9s\u2014three.\tFour \U0001f4a1\n  don't; 3.5\n"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """The path of a byte-level tokenizer.json whose settings truncate and pad texts."""
    model = ByteLevelBPETokenizer()
    model.train_from_iterator([TEXT, "the lamp the door the key of the lamp"] * 9, vocab_size=300)
    model.enable_truncation(4)
    model.enable_padding(length=4)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    model.save(str(path))
    return str(path)


def write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(root)


def split_texts(splits):
    """{split: the text of each document}, for lossless tokens."""
    return {
        split: [part.tokenizer.decode(part.document(i)) for i in range(len(part.starts))]
        for split, part in splits.items()
    }


def test_the_wikitext_fixture(tmp_path):
    splits = documents("wikitext", str(FIXTURES / "wikitext"), str(tmp_path))
    text = (FIXTURES / "wikitext" / "wiki.valid.tokens").read_text()
    valid = splits["valid"]
    assert list(splits) == list(SPLITS) and valid.names == ["Small lamp", "Tall door"]
    assert split_texts(splits)["valid"][1] == " = Tall door = \n \n A tall door opens . \n"
    assert "".join(split_texts(splits)["valid"]) == text and valid.characters == len(text)
    # As usual for WikiText, an end of line is the word <eos>.
    assert valid.words == len(re.findall(r"\S+|\n", text)) == 63
    assert valid.tokens.dtype == np.uint8 and valid.starts.dtype == np.int64
    assert isinstance(valid.tokens, np.memmap)


@pytest.mark.parametrize(
    "text, names",
    [
        (" \n = A = \n \n x \n \n = Bc = \n \n y \n", ["A", "Bc"]),
        (" = A = \n \n x \n \n = B = \n \n", ["A", "B"]),
        # A title needs a blank line before and after.
        (" \n = A = \n \n x \n = B = \n \n y \n \n = C = \n z \n", ["A"]),
        (" \n = A = \n \n = = B = = \n \n = = = C = = = \n \n = D \n \n E = \n \n", ["A"]),
        (" x \n \n = A = \n \n y \n", ["wiki.train.tokens", "A"]),
        (" x \n y \n", ["wiki.train.tokens"]),
        (" \n = A = \n \n = B = \n \n y", ["A", "B"]),
    ],
)
@pytest.mark.parametrize("piece", [1, 9, 1 << 16])
def test_a_title_between_blank_lines_begins_an_article(tmp_path, monkeypatch, text, names, piece):
    monkeypatch.setattr(corpora, "PIECE", piece)
    root = write(tmp_path / "wiki", {f"wiki.{split}.tokens": text for split in SPLITS})
    train = documents("wikitext", root, str(tmp_path))["train"]
    assert train.names == names and bytes(train.tokens) == text.encode() and train.starts[0] == 0
    for name, start in zip(names, train.starts, strict=True):
        assert name.startswith("wiki") or text[start:].lstrip(" \n").startswith(f"= {name} = \n")


def test_raw_files_are_preferred(tmp_path):
    files = {f"wiki.{split}.raw": f" \n = {split} = \n \n raw \n" for split in SPLITS}
    files |= {f"wiki.{split}.tokens": " \n = A = \n \n <unk> \n" for split in SPLITS}
    splits = documents("wikitext", write(tmp_path / "raw", files), str(tmp_path))
    assert [splits[split].names for split in SPLITS] == [[split] for split in SPLITS]


def test_the_pg19_fixture(tmp_path):
    splits = documents("pg19", str(FIXTURES / "pg19"), str(tmp_path))
    names = ["The Lamp by Nobody", "The Door, and Others by A. B.", "The Key by C. D."]
    assert [splits[split].names for split in SPLITS] == [[name] for name in names]
    assert split_texts(splits)["test"] == ["THE KEY\n\nBo found a key.\n"]
    assert splits["test"].words == 6


@pytest.mark.parametrize("share, ids", [(0.07, [2, 3]), (1, range(2, 32)), (1e-6, [2])])
def test_train_share_takes_the_first_books_by_number(tmp_path, share, ids):
    files = {f"train/{i}.txt": f"book {i}" for i in range(2, 32)}
    files |= {"validation/1.txt": "v", "test/32.txt": "t"}
    splits = documents("pg19", write(tmp_path / "pg19", files), str(tmp_path), train_share=share)
    books = [f"book {i}" for i in ids]
    assert split_texts(splits) == {"train": books, "valid": ["v"], "test": ["t"]}
    assert splits["train"].names == [str(i) for i in ids]  # without a metadata.csv
    assert splits["train"].starts.tolist() == np.cumsum([0, *map(len, books)])[:-1].tolist()


@pytest.mark.parametrize("size", [20, 999, 2003])
@pytest.mark.parametrize("piece", [1, 64, 1 << 16])
def test_enwik8_keeps_every_byte_in_parts_of_18_1_and_1_of_20(tmp_path, monkeypatch, size, piece):
    monkeypatch.setattr(corpora, "PIECE", piece)
    alphabet = np.frombuffer(b"a\xc3\xa9 \xff\n\r\0", np.uint8)
    content = np.random.default_rng(size).choice(alphabet, size).tobytes()
    write(tmp_path, {"plain/enwik8": content, "zipped/x": ""})
    with zipfile.ZipFile(tmp_path / "zipped" / "enwik8.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("enwik8", content)
    for where in ("plain", "plain/enwik8", "zipped", "zipped/enwik8.zip"):
        splits = documents("enwik8", str(tmp_path / where), str(tmp_path / "cache" / where))
        assert b"".join(bytes(splits[split].tokens) for split in SPLITS) == content
        sizes = np.diff([0, int(size * 0.9), int(size * 0.95), size]).tolist()
        assert [splits[split].characters for split in SPLITS] == sizes
        assert all(splits[split].starts.tolist() == [0] for split in SPLITS)


@pytest.mark.parametrize("held_out", [0.01, 0.1, 0.49])
def test_a_book_is_in_one_split(tmp_path, held_out):
    parts = {}
    for count in (3, 4, 5, 14, 33):
        files = {f"{i}.txt": f"book {i}" for i in range(count)}
        directory = write(tmp_path / str(count), files)
        splits = documents("books", directory, str(tmp_path), held_out=held_out)
        names = [name for split in SPLITS for name in splits[split].names]
        assert sorted(names) == sorted(str(i) for i in range(count))
        held = max(1, min(round(held_out * count), (count - 1) // 2))
        counts = [len(splits[split].names) for split in SPLITS]
        assert counts == [count - 2 * held, held, held]
        for split, texts in split_texts(splits).items():
            assert texts == [f"book {name}" for name in splits[split].names]
        parts[count] = {split: splits[split].names for split in SPLITS}
    again = write(tmp_path / "elsewhere", {f"{i}.txt": f"another {i}" for i in reversed(range(14))})
    splits = documents("books", again, str(tmp_path), held_out=held_out)
    assert {split: splits[split].names for split in SPLITS} == parts[14]


@pytest.mark.parametrize("valid", ["valid", "validation"])
def test_folders_of_books(tmp_path, valid):
    files = {"train/b.txt": "1", "train/a.txt": "2", f"{valid}/a.txt": "3"}
    files |= {"test/10.txt": "4", "test/9.txt": "5", "outside.txt": "6"}
    splits = documents("books", write(tmp_path / "books", files), str(tmp_path))
    assert split_texts(splits) == {"train": ["2", "1"], "valid": ["3"], "test": ["5", "4"]}


@pytest.mark.parametrize("piece", [1, 7, 64])
@pytest.mark.parametrize("kind", ["bytes", "characters", "words", "bpe"])
def test_pieces_have_the_tokens_of_the_complete_text(tmp_path, monkeypatch, bpe, kind, piece):
    texts = {f"{i}.txt": TEXT * i + "the key\n\n\n  of the door " * 5 for i in range(1, 5)}
    directory, name = write(tmp_path / "books", texts), bpe if kind == "bpe" else kind
    complete = documents("books", directory, str(tmp_path / "complete"), name)
    monkeypatch.setattr(corpora, "PIECE", piece)
    pieces = documents("books", directory, str(tmp_path / "pieces"), name)
    for split in SPLITS:
        a, b = complete[split], pieces[split]
        np.testing.assert_array_equal(a.tokens, b.tokens)
        assert a.starts.tolist() == b.starts.tolist()
        assert (a.names, a.words, a.characters) == (b.names, b.words, b.characters)
        text = "".join(texts[f"{book}.txt"] for book in a.names)
        assert a.words == len(text.split()) and a.characters == len(text)
        assert a.tokens.dtype == np.min_scalar_type(a.tokenizer.size - 1) and len(a.tokens) > 30
        np.testing.assert_array_equal(a.document(0), a.tokenizer.encode(texts[f"{a.names[0]}.txt"]))


def test_tokenizers_lose_nothing(bpe):
    for name in ("bytes", "characters", bpe):
        tokenizer = make_tokenizer(name, [TEXT])
        ids = tokenizer.encode(TEXT)
        assert tokenizer.decode(ids) == TEXT and ids.dtype.kind == "u" and max(ids) < tokenizer.size
        assert tokenizer.size == len(tokenizer.vocabulary) == len(set(tokenizer.vocabulary))
        again = tokenizers.restore(name, json.loads(json.dumps(tokenizer.state)))
        assert again.encode(TEXT).tolist() == ids.tolist()
        assert len(tokenizer.encode("")) == 0
    assert make_tokenizer("bytes").encode(TEXT).tobytes() == TEXT.encode()
    assert len(make_tokenizer(bpe).encode("the lamp " * 9)) > 4  # neither truncated nor padded
    words = make_tokenizer("words", [TEXT])
    assert words.decode(words.encode("Don't; THREE\u2014five")) == "don't three <unk>"


@pytest.mark.parametrize("kind", ["bytes", "characters", "words", "file"])
def test_a_tokenizer_is_made_again_without_its_file(kind, bpe):
    ours = make_tokenizer(bpe if kind == "file" else kind, ["one and two and three"])
    again = tokenizers.unpacked(json.loads(json.dumps(tokenizers.packed(ours))), ours.vocabulary)
    text = "one, or two and three: " * 20  # longer than the limit in the file
    ids = ours.encode(text)
    assert again.encode(text).tolist() == ids.tolist() and again.vocabulary == ours.vocabulary
    assert again.lossless == ours.lossless and again.decode(ids) == ours.decode(ids)


def test_a_lossy_tokenizer_json_is_not_lossless(tmp_path, bpe):
    assert make_tokenizer(bpe).lossless
    model, path = BertWordPieceTokenizer(), tmp_path / "tokenizer.json"
    model.train_from_iterator([TEXT], vocab_size=200)
    knows_one = Tokenizer(models.WordLevel({"the": 0}))  # no token for unknown words
    for lossy in (model, knows_one):
        lossy.save(str(path))
        assert not make_tokenizer(str(path)).lossless


def test_a_vocabulary_comes_from_the_training_text(tmp_path):
    texts = {f"{name}.txt": character * 9 for name, character in zip(SPLITS, "abc", strict=True)}
    files = {f"{split}/{split}.txt": texts[f"{split}.txt"] + "a" for split in SPLITS}
    directory = write(tmp_path / "books", files)
    for _ in range(2):  # prepared, then read back
        splits = documents("books", directory, str(tmp_path / "cache"), "characters")
        assert splits["train"].tokenizer.vocabulary == ["<unk>", "a"]
        assert splits["test"].tokens.tolist() == [0] * 9 + [1]
    assert make_tokenizer("characters", ["abb", "cb"]).vocabulary == ["<unk>", "b", "a", "c"]
    assert make_tokenizer("characters", ["abb", "cb"], min_count=2).vocabulary == ["<unk>", "b"]
    invalid = b"\xff\xfe".decode("utf-8", "surrogateescape")
    assert make_tokenizer("characters", [invalid]).encode(invalid + "\udc80").tolist() == [2, 1, 0]


def test_tokens_are_made_once_for_each_setting(tmp_path, monkeypatch, bpe):
    root, cache, moved = tmp_path / "books", tmp_path / "cache", tmp_path / "moved.json"
    directory = write(root, {f"{i}.txt": f"book {i} " * 9 for i in range(9)})
    shutil.copy(bpe, moved)

    def made(*tokenizer, **options):
        """Opens the documents and counts the new folders."""
        before = len(list(cache.glob("documents/*")))
        documents("books", directory, str(cache), *tokenizer, **options)
        return len(list(cache.glob("documents/*"))) - before

    kept = documents("books", directory, str(cache))
    with monkeypatch.context() as patch:
        patch.setattr(tokenizers.Bytes, "encode", None)
        again = documents("books", directory, str(cache))
    for split in SPLITS:
        np.testing.assert_array_equal(kept[split].tokens, again[split].tokens)
    assert made() == 0 and made("characters") == 1 and made("characters") == 0 and made(bpe) == 1
    assert made(str(moved)) == 0  # the same content in another file
    moved.write_text(moved.read_text() + "\n")
    assert made(str(moved)) == 1
    assert made(held_out=0.3) == 1
    write(root, {"0.txt": "another text, and longer"})
    assert made() == 1
    (root / "1.txt").rename(root / "one.txt")
    assert made() == 1


def test_a_book_that_moves_to_another_split_is_not_taken_from_the_cache(tmp_path):
    root = tmp_path / "books"
    files = {"train/1.txt": "1", "train/2.txt": "2", "valid/3.txt": "3", "test/4.txt": "4"}
    documents("books", write(root, files), str(tmp_path))
    (root / "train" / "2.txt").rename(root / "valid" / "2.txt")
    assert split_texts(documents("books", str(root), str(tmp_path)))["valid"] == ["2", "3"]


def test_an_error_leaves_nothing_and_the_first_to_finish_wins(tmp_path, monkeypatch):
    files = {f"{split}/{split}.txt": f"{split} book" for split in SPLITS}
    directory = write(tmp_path / "books", files)
    cache, encode = tmp_path / "cache", tokenizers.Bytes.encode
    with monkeypatch.context() as patch:

        def fails(self, string):
            if string == "test book":
                raise OSError("no space left")
            return encode(self, string)

        patch.setattr(tokenizers.Bytes, "encode", fails)
        with pytest.raises(OSError, match="no space left"):
            documents("books", directory, str(cache))
        assert not [path for path in cache.rglob("*") if path.is_file()]
    together, results = threading.Barrier(3), []

    def waits(self, string):
        if string == "test book":
            together.wait(10)  # all three write
        return encode(self, string)

    with monkeypatch.context() as patch:
        patch.setattr(tokenizers.Bytes, "encode", waits)
        opens = lambda: results.append(split_texts(documents("books", directory, str(cache))))
        threads = [threading.Thread(target=opens) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [{split: [f"{split} book"] for split in SPLITS}] * 3
    assert len(list((cache / "documents").iterdir())) == 1


BOOKS = {f"{i}.txt": "x" for i in range(3)}
TWO_BOOKS = {f"{i}.txt": "x" for i in range(2)}
PG19 = {"train/1.txt": "x", "validation/2.txt": "x", "test/3.txt": "x"}
METADATA = {"metadata.csv": '1,"A, b",1,u\n2,A, b,1,u\n'}
CHARS, FILE = {"tokenizer": "chars"}, {"tokenizer": "{root}/t.json"}
NO_TEST, ONE_FILE = {"train/1.txt": "x", "valid/1.txt": "x"}, {"wiki.train.tokens": "x"}
NO_VALID, NO_VALID_TEXT = {"train/1.txt": "x", "test/3.txt": "x"}, PG19 | {"validation/2.txt": ""}
MISSING = [  # (kind, files, options, text of the FileNotFoundError)
    ("wikitext", ONE_FILE, {}, "wiki.train.tokens and wiki.valid.tokens and wiki"),
    ("pg19", NO_VALID, {}, "no .txt file in {root}/validation. PG"),
    ("enwik8", {"enwik9": "x"}, {}, "{root}: has neither enwik8 nor enwik8.zip. enwik8.zip is at"),
    ("books", {}, {}, "expected at least one .txt file, found none. Set data.dir"),
    ("books", NO_TEST, {}, "no .txt file in {root}/test. Set data"),
    (
        "books",
        BOOKS,
        CHARS,
        "tokenizer='chars': expected 'bytes', 'characters', 'words', or the path",
    ),
]
BAD_TITLES = "{root}/metadata.csv, line 2, field short_book_title: expected book "
BAD_ZIP = "{root}/enwik8.zip: not an intact archive of a file enwik8"
WRONG = [  # (kind, files, options, text of the ValueError)
    ("books", BOOKS, {"held_out": 0.5}, "config.data.text.held_out = 0.5: must be "),
    ("pg19", PG19, {"train_share": 0}, "config.data.text.train_share = 0: must be "),
    ("pg19", PG19, {"train_share": 1.1}, "config.data.text.train_share = 1.1: must be "),
    ("pg19", PG19 | METADATA, {}, BAD_TITLES),
    ("pg19", NO_VALID_TEXT, {}, "{root}/validation/2.txt: expected text for 'valid'"),
    ("enwik8", {"enwik8": "x"}, {}, "{root}/enwik8: expected text for 'train', found none"),
    ("enwik8", {"enwik8.zip": "no archive"}, {}, BAD_ZIP),
    ("books", TWO_BOOKS, {}, "{root}/0.txt: expected text for 'train'"),
    ("books", BOOKS | {"t.json": "{}"}, FILE, "{root}/t.json: not a tokenizer.json"),
]
ERRORS = [(*case, FileNotFoundError) for case in MISSING] + [(*case, ValueError) for case in WRONG]


@pytest.mark.parametrize("kind, files, options, says, error", ERRORS)
def test_the_cause_of_an_error_is_named(tmp_path, kind, files, options, says, error):
    root = tmp_path / "data"
    root.mkdir()
    fill = lambda value: value.format(root=root) if isinstance(value, str) else value
    options = {name: fill(value) for name, value in options.items()}
    with pytest.raises(error, match=re.escape(says.format(root=root))):
        documents(kind, write(root, files), str(tmp_path / "cache"), **options)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_no_directory_says_where_the_data_comes_from(tmp_path):
    for kind in KINDS:
        says = re.escape(f"{kind}: data.dir is empty. {advice(kind)}")
        with pytest.raises(FileNotFoundError, match=says):
            documents(kind, "", str(tmp_path))


def test_a_damaged_zip_is_named(tmp_path):
    path = tmp_path / "enwik8.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("enwik8", " ".join(map(str, range(9999))))
    intact = path.read_bytes()
    noisy = intact[:9000] + b"noise" * 9 + intact[9045:]
    says = re.escape(f"{path}: not an intact archive of a file enwik8")
    for damaged in (intact[:10_000], noisy, intact.replace(b"enwik8", b"enwik9")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=says):
            documents("enwik8", str(tmp_path), str(tmp_path / "cache"))


def test_a_missing_library_or_text_is_named(monkeypatch, bpe):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    says = re.escape("not installed: pip install 'rmjax[text]'")
    with pytest.raises(ModuleNotFoundError, match=says):
        make_tokenizer(bpe)
    for name in ("characters", "words"):
        says = f"tokenizer='{name}': the training texts, which give the vocabulary, are empty"
        for texts in (None, [], [""]):
            with pytest.raises(ValueError, match=says):
                make_tokenizer(name, texts)


SAMPLE = "Ünïcode, 中文 lamp\n" * 9
ENCODED = {
    "UTF-8": codecs.BOM_UTF8 + SAMPLE.encode(),
    "UTF-16": SAMPLE.encode("utf-16"),
    "UTF-16 BE": codecs.BOM_UTF16_BE + SAMPLE.encode("utf-16-be"),
    "UTF-32": SAMPLE.encode("utf-32"),
}


def folders(kind, content):
    """The files of a kind of corpus, all with this content."""
    if kind == "wikitext":
        return {f"wiki.{split}.raw": content for split in SPLITS}
    if kind == "enwik8":
        return {"enwik8": content}
    valid = "validation" if kind == "pg19" else "valid"
    return {f"{split}/1.txt": content for split in ("train", valid, "test")}


@pytest.mark.parametrize("encoding", ENCODED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_order_mark_is_obeyed_and_is_not_a_token(tmp_path, kind, encoding):
    directory = write(tmp_path / "data", folders(kind, ENCODED[encoding]))
    for tokenizer in ("characters", "words", *(["bytes"] if kind != "enwik8" else [])):
        train = documents(kind, directory, str(tmp_path), tokenizer)["train"]
        text = "".join(split_texts(dict(train=train))["train"])
        assert "lamp" in train.tokenizer.vocabulary or train.tokenizer.lossless
        if train.tokenizer.lossless:
            assert SAMPLE.startswith(text.rstrip()) and len(text) >= 0.85 * len(SAMPLE)
        else:
            assert text.startswith("ünïcode 中文 lamp ünïcode")
    gc.collect()  # no file is left open: pytest would warn


def test_enwik8_as_bytes_keeps_every_byte(tmp_path):
    for content in (*ENCODED.values(), b"\xff\xfe\xff\0" * 9):
        directory = write(tmp_path / "data", {"enwik8": content})
        splits = documents("enwik8", directory, str(tmp_path))
        assert b"".join(bytes(splits[split].tokens) for split in SPLITS) == content


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_another_encoding_are_counted(tmp_path, kind, caplog):
    latin = "déjà vu, là-bas\n".encode("latin-1") * 40
    files = folders(kind, latin)
    directory = write(tmp_path / "data", files)
    path = tmp_path / "data" / next(iter(files))
    endings = {"bytes": "kept as they are", "characters": "replaced", "words": "replaced"}
    for tokenizer, ending in endings.items():
        caplog.clear()
        train = documents(kind, directory, str(tmp_path), tokenizer)["train"]
        if tokenizer == "bytes":
            assert latin.startswith(bytes(train.tokens))
        else:
            letters = "".join(train.tokenizer.vocabulary)
            assert not any("\udc80" <= c <= "\udcff" for c in letters)
        if kind != "enwik8":
            says = f"{path}: 120 bytes are not UTF-8, and were {ending}: save the file as UTF-8"
            assert says in caplog.text
        elif tokenizer == "bytes":
            assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("kind", KINDS)
def test_utf_16_without_a_byte_order_mark_is_refused(tmp_path, kind, bpe):
    files = folders(kind, SAMPLE.encode("utf-16-le"))
    directory = write(tmp_path / "data", files)
    path = tmp_path / "data" / next(iter(files))
    for tokenizer in ("characters", "words", bpe):
        with pytest.raises(
            ValueError, match=re.escape(f"{path}: has NUL characters, as UTF-16 without")
        ):
            documents(kind, directory, str(tmp_path / "cache"), tokenizer)
    documents(kind, directory, str(tmp_path), "bytes")


@pytest.mark.parametrize("content", [b"\xff\xfea\0b", b"\xff\xfe\0\xd8a\0", b"\xff\xfe\0\0a\0\0"])
def test_utf_16_that_goes_on_otherwise_is_refused(tmp_path, content):
    directory = write(tmp_path / "data", folders("books", content))
    with pytest.raises(ValueError, match=r"1\.txt: begins as UTF-(16|32) and goes on otherwise"):
        documents("books", directory, str(tmp_path / "cache"))


def test_hidden_files_are_not_books(tmp_path):
    texts = {f"{i}.txt": f"book {i}" for i in range(4)}
    texts |= {f"._{i}.txt": "Mac OS X" for i in range(4)}
    splits = documents("books", write(tmp_path / "books", texts), str(tmp_path))
    assert sorted(name for split in SPLITS for name in splits[split].names) == ["0", "1", "2", "3"]
    hidden = {"train/._1.txt": "Mac OS X", "validation/._1.txt": "Mac OS X"}
    files = folders("pg19", "book") | hidden
    splits = documents("pg19", write(tmp_path / "pg19", files), str(tmp_path), train_share=1)
    assert [splits[split].names for split in SPLITS] == [["1"]] * 3


def test_wikitext_without_titles_is_warned_about(tmp_path, caplog):
    rows = [" = Lamp = ", " A small lamp . ", " = Door = ", " A tall door . "]
    for content, titled in (("".join(rows), False), (" \n \n" + "\n \n".join([*rows, ""]), True)):
        caplog.clear()
        files = {f"wiki.{split}.raw": content for split in SPLITS}
        documents("wikitext", write(tmp_path / "wiki", files), str(tmp_path))
        assert ("wiki.test.raw: no title was found" in caplog.text) != titled


@pytest.mark.parametrize(("count", "large"), [(1, False), (3, True), (12, False)])
def test_the_log_names_the_files_of_splits_and_warns_of_large_ones(tmp_path, caplog, count, large):
    texts = {f"{i}.txt": "some words " * 9 for i in range(count)}
    directory = write(tmp_path / "books", texts)
    with caplog.at_level("INFO"):
        splits = documents("books", directory, str(tmp_path / "cache"))
    if count == 1:
        assert "books, parts of 0.txt: train 81 tokens (81.8%), valid 11" in caplog.text
    for split in SPLITS if count > 1 else ():
        (line,) = (
            text
            for text in caplog.messages
            if f"books: {split} {len(splits[split].tokens):,}" in text
        )
        names, tokens = splits[split].names, len(splits[split].tokens)
        assert f" {tokens:,} tokens ({100 * tokens / 99 / count:.3g}%) from " in line
        shown, rest = ", ".join(f"{name}.txt" for name in names[:3]), len(names) - 3
        more = f" and {rest} more." if rest > 0 else "."
        assert line.endswith(("" if len(names) == 1 else f"{len(names)} files: ") + shown + more)
    warnings = [text for text in caplog.messages if "takes" in text]
    wanted = "valid takes 33.3%, not 10% and test takes 33.3%, not 10% (config.data.text.held_out)"
    assert len(warnings) == large and all(wanted in text for text in warnings)


def test_given_splits_may_have_any_share(tmp_path, caplog):
    files = {f"{split}/1.txt": "some words" for split in SPLITS}
    documents("books", write(tmp_path / "books", files), str(tmp_path / "cache"))
    assert "takes" not in caplog.text


@pytest.mark.parametrize("held_out", [0.1, 0.25])
@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_books_are_cut_by_position(tmp_path, caplog, count, held_out):
    words = [f"wörd{i}" for i in range(400)]
    texts = {f"{i}.txt": codecs.BOM_UTF8 + " ".join(words).encode() for i in range(count)}
    directory = write(tmp_path / "books", texts)
    for where in (directory, f"{directory}/0.txt") if count == 1 else (directory,):
        caplog.clear()
        with caplog.at_level("INFO"):
            splits = documents("books", where, str(tmp_path / "cache"), "words", held_out=held_out)
        assert f"The last {100 * held_out:g}% of each file is the test split" in caplog.text
        names = [[f"{i} {split}" for i in range(count)] for split in SPLITS]
        assert [splits[split].names for split in SPLITS] == names
        for book in range(count):
            parts = [splits[split].document(book) for split in SPLITS]
            decoded = splits["train"].tokenizer.decode(np.concatenate(parts)).split()
            assert decoded.count("<unk>") == len(parts[1]) + len(parts[2])
            assert sum(map(len, parts)) == 400
            assert len(parts[0]) == pytest.approx(400 * (1 - 2 * held_out), abs=9)
            assert len(parts[1]) == pytest.approx(len(parts[2]), abs=9)
    train = documents("books", directory, str(tmp_path / "cache"), "words", held_out=0.3)["train"]
    assert len(train.document(0)) < len(parts[0])  # another share is not taken from the cache


def test_a_book_without_white_space_is_cut_between_characters(tmp_path):
    directory = write(tmp_path / "books", {"one.txt": "中文字" * 99})
    splits = documents("books", directory, str(tmp_path), "characters")
    assert "".join(sum(split_texts(splits).values(), [])).replace("<unk>", "") == "中文字" * 99


@pytest.mark.parametrize("text", ["x", "中", "中文\r\n", "ab cd\r\n"])
def test_pieces_are_linear_in_the_text(tmp_path, monkeypatch, text):
    """The search for cuts reads every byte about once, and cuts text without white space too."""
    monkeypatch.setattr(corpora, "PIECE", 1 << 9)
    monkeypatch.setattr(corpora, "LONGEST", 1 << 12)
    complete = (text * (1 << 15)).encode()
    (tmp_path / "book.txt").write_bytes(complete)
    looked, cut = [], corpora._CUT

    class Counted:
        def match(self, data, place):
            looked.append(len(data) - place)
            return cut.match(data, place)

    monkeypatch.setattr(corpora, "_CUT", Counted())
    pieces = list(corpora.book(tmp_path / "book.txt", "book"))
    assert "".join(piece for _, piece in pieces).encode() == complete
    assert [name for name, _ in pieces[:2]] == ["book", None]
    assert sum(looked) < 1.1 * len(complete)
    assert max(len(piece.encode()) for _, piece in pieces) < (1 << 12) + 9
    if " " in text or "\r" in text:
        assert all(piece.startswith((" ", "\r\n")) for _, piece in pieces[1:])
        assert max(len(piece.encode()) for _, piece in pieces) <= (1 << 9) + 10


@pytest.mark.parametrize("text", [" \n" * 20_000, "no blank before\n" * 9000, "one line " * 20_000])
def test_articles_without_titles_are_read_in_pieces(tmp_path, monkeypatch, text):
    monkeypatch.setattr(corpora, "LONGEST", 1 << 14)
    (tmp_path / "wiki.raw").write_text(text)
    pieces = list(wikitext._articles(tmp_path / "wiki.raw"))
    assert "".join(piece for _, piece in pieces) == text
    assert text.isspace() or max(len(piece) for _, piece in pieces) <= 1 << 15


def test_variants_of_metadata_are_read(tmp_path):
    line = '1,"The Lamp, and\r\nOthers",1901,http://www.gutenberg.org/ebooks/1\n'
    variants = [line, line + "\n", line + " \r\n\n", "\ufeff" + line, line.rstrip()]
    for content in (*variants, ("\n" + line).encode("utf-16")):
        directory = write(tmp_path / "pg19", folders("pg19", "x") | {"metadata.csv": content})
        train = documents("pg19", directory, str(tmp_path))["train"]
        assert train.names == ["The Lamp, and\r\nOthers"]
        shutil.rmtree(tmp_path / "documents")


def test_metadata_cut_inside_a_line_is_refused(tmp_path):
    url = "http://www.gutenberg.org/ebooks"
    lines = f'1,The Lamp,1901,{url}/1\n2,"Two, Doors",1902,{url}/2\n'
    directory, accepted = write(tmp_path / "pg19", folders("pg19", "x")), []
    for length in range(len(lines) + 1):
        (tmp_path / "pg19" / "metadata.csv").write_text(lines[:length])
        try:
            pg19._titles(Path(directory) / "metadata.csv")
            accepted.append(length)
        except ValueError as error:
            assert "metadata.csv, line" in str(error) and "field" in str(error)
    first = lines.index("\n")
    assert accepted == [0, first, first + 1, len(lines) - 1, len(lines)]  # complete lines


def test_a_tokenizer_may_be_named_by_its_folder(tmp_path, bpe):
    by_folder, by_file = make_tokenizer(str(Path(bpe).parent)), make_tokenizer(bpe)
    assert by_folder.encode(TEXT).tolist() == by_file.encode(TEXT).tolist()
    says = re.escape(f"there is no file {tmp_path}/tokenizer.json")
    with pytest.raises(FileNotFoundError, match=says):
        make_tokenizer(str(tmp_path))


@pytest.mark.parametrize("number", [2**31, 2**24, 2**16])
def test_an_id_far_beyond_the_others_is_refused(tmp_path, number):
    path = tmp_path / "tokenizer.json"
    saved = json.loads(Tokenizer(models.WordLevel({"the": 0, "lamp": 1}, unk_token="the")).to_str())
    saved["model"]["vocab"]["lamp"] = number
    path.write_text(json.dumps(saved))
    says = re.escape(f"{path}: the token 'lamp' has the id {number}, of 2 tokens")
    with pytest.raises(ValueError, match=says):
        make_tokenizer(str(path))


def test_an_encrypted_zip_is_named(tmp_path):
    path = tmp_path / "enwik8.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("enwik8", "text")
    data = bytearray(path.read_bytes())
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(header) + flags] |= 1
    path.write_bytes(data)
    says = re.escape(f"{path}: not an intact archive of a file enwik8 (")
    with pytest.raises(ValueError, match=says) as error:
        documents("enwik8", str(tmp_path), str(tmp_path / "cache"))
    assert "encrypted" in str(error.value)


def test_the_cache_folder_is_the_default_or_the_given_one(tmp_path, monkeypatch):
    directory = write(tmp_path / "books", folders("books", "x"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    documents("books", directory, "")
    assert len(list((tmp_path / "xdg" / "rmjax" / "documents").iterdir())) == 1
    (tmp_path / "file").touch()
    says = r"cannot be kept there .*: set config\.data\.cache_dir to a folder"
    with pytest.raises(OSError, match=says):
        documents("books", directory, str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"config\.data\.dir=s3://.* is an address"):
        documents("books", "s3://bucket/books", "")


@pytest.mark.parametrize("cut", [slice(0, 60), slice(30, 90), slice(-40, -22)])
def test_a_zip_with_a_hole_is_named(tmp_path, cut):
    path = tmp_path / "enwik8.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("enwik8", "text " * 40)
    data = bytearray(path.read_bytes())
    del data[cut]
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=re.escape(f"{path}: not an intact archive of a file enwik8")
    ):
        documents("enwik8", str(tmp_path), str(tmp_path / "cache"))


@pytest.mark.parametrize("before", ["xy", "xyz", "x" * 16, "x" * 17])
def test_a_line_in_several_pieces_is_one_line_and_one_word(tmp_path, monkeypatch, before):
    monkeypatch.setattr(corpora, "LONGEST", 8)
    monkeypatch.setattr(corpora, "PIECE", 4)
    text = f" \n = A = \n \n{before}\n = B = \n \n{before} y\n"
    root = write(tmp_path / "wiki", {f"wiki.{split}.tokens": text for split in SPLITS})
    train = documents("wikitext", root, str(tmp_path / "cache"))["train"]
    assert train.names == ["A"] and bytes(train.tokens) == text.encode()
    assert train.words == len(text.split()) + text.count("\n")
    files = {f"{split}/a.txt": f"{before} {before}{before}" for split in SPLITS}
    root = write(tmp_path / "books", files)
    train = documents("books", root, str(tmp_path / "cache"))["train"]
    assert train.words == 2


def test_names_of_documents_can_be_printed(tmp_path):
    files = {f"wiki.{split}.tokens": b" \n = Caf\xe9 = \n \n x \n" for split in SPLITS}
    splits = documents("wikitext", write(tmp_path / "wiki", files), str(tmp_path))
    assert splits["train"].names == ["Caf\ufffd"]


@pytest.mark.parametrize(
    "token, number, wrong", [("lamp", 0, "the id 0 of 'the'"), ("[CLS]", 7, "the id 7, and gets 2")]
)
def test_every_token_has_an_id_of_its_own(tmp_path, token, number, wrong):
    model = Tokenizer(models.WordLevel({"the": 0, "lamp": 1}, unk_token="the"))
    model.add_special_tokens(["[CLS]"])
    saved = json.loads(model.to_str())
    if token == "lamp":
        saved["model"]["vocab"][token] = number
    else:
        saved["added_tokens"][0]["id"] = number
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(
        ValueError, match=rf"tokenizer\.json: the token '.*' has the id {number}"
    ) as error:
        make_tokenizer(str(tmp_path))
    assert token == "lamp" or wrong in str(error.value)


def test_a_text_without_a_token_is_refused_by_the_name_of_the_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"the": 0})).save(str(path))
    with pytest.raises(ValueError, match=re.escape(f"{path}: a text cannot be tokenized")):
        make_tokenizer(str(path)).encode("lamp")


@pytest.mark.parametrize(("kind", "key"), [("pg19", "train_share"), ("books", "held_out")])
def test_a_share_reaches_the_corpus(tmp_path, kind, key):
    files = {f"train/{i}.txt": "a book " * 9 for i in range(10)}
    files |= {"validation/1.txt": "v" * 40, "test/32.txt": "t" * 40}
    if kind == "books":
        files = {f"{i}.txt": "a book " * 9 for i in range(10)}
    common = SimpleNamespace(dir=write(tmp_path / kind, files), cache_dir=str(tmp_path))
    common.segment_length, common.segments = 8, 1
    for share in (0.2, 0.4):
        settings = SOURCES.settings(kind, {key: share}, "config.data.text.")
        made = SOURCES[kind].make(settings, common, 0).splits
        expected = documents(kind, common.dir, str(tmp_path), **{key: share})
        assert {s: made[s].names for s in SPLITS} == {s: expected[s].names for s in SPLITS}
    assert len(made["train"].names) == (4 if kind == "pg19" else 2)
