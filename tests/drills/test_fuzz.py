"""Damaged files: a loader agrees with a second reader, or its error names the file and the place.

A case is one file of a loader's fixture with one mutation. Both are drawn from the loader's name
and the case's number. The second readers are small, in plain Python, and import nothing of
`rmjax.data`.

A changed byte of numbers in .npy, .h5 and .safetensors, and of a text or a plain .tar, is accepted.
These formats have no digest, and both readers get the same wrong number. .npz, .zip, .gz and saved
memories have a digest, so a change is refused. Orbax draws names for its files, so a case of a
saved memory may change another file when it is repeated.

    python -m pytest tests/drills/test_fuzz.py -m slow -n0 -s     200 cases a loader, and a table
    python -c "from tests.drills import test_fuzz; test_fuzz.repeat('movielens ratings.csv', 17)"
"""

from __future__ import annotations

import ast
import codecs
import collections
import contextlib
import csv
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import logging
import random
import re
import resource
import shutil
import signal
import tarfile
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.dom import minidom

import h5py
import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from rmjax import config, memoria
from rmjax.data.clicks import movielens, table, xlong
from rmjax.data.stories import activitynet, babi, jsonl, narrativeqa, tvqa, vectors
from rmjax.data.texts import hyperpartisan
from rmjax.data.texts import tokenizers as our_tokenizers
from rmjax.models import gpt2, huggingface
from rmjax.run import kept
from tests import FIXTURES
from tests.data.texts.opening import documents
from tests.data.texts.test_hyperpartisan import write as write_hyperpartisan
from tests.memoria.runs import small
from tests.serve.test_streams import streams

SPLITS = ("train", "valid", "test")
SECONDS, BYTES = 20, 3 << 30  # the time and memory that a case may take
NAMED = (ValueError, OSError, ImportError)
PLACES = (
    r"\b(lines?|byte|fields?|article|articles, first|entry|key|question|user|split|token|frame)"
    r" ['\w-]|\b(row|column) \w"
    r"|lists of ids|targets in every split|expected text for|has no tensor|transformer\.\w"
    r"|index\.json names it|not found in|SHA256SUMS|config\.\w|two clips or more|expected one array"
)
WHOLE = (  # errors of a complete file
    r"cut short|not an intact archive|not a whole \.gz|cannot be read as \.|not a tokenizer\.json"
    r"|vocabulary is empty|the file is empty|cannot be read: (nested too deep|Exceeds)|is UTF-16"
    r"|begins as UTF-|encoding that is not read|: 0 of \d+ words found"
)


class Hangs(BaseException):
    """A case takes too long. No loader catches this exception."""


# Mutations.

_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")
_NUMBERS = (b"-1", b"2147483648", b"9223372036854775808", b"1" + b"0" * 400, b"nan", b"1e400")


Mutation = Callable[[random.Random, bytes], bytes]


def _lines(change: Callable[[random.Random, list[bytes]], Any]) -> Mutation:
    def changed(rng: random.Random, data: bytes) -> bytes:
        lines = data.splitlines(keepends=True) or [b""]
        change(rng, lines)
        return b"".join(lines)

    return changed


def _swap(rng: random.Random, things: Any) -> None:
    if things:
        i, j = rng.randrange(len(things)), rng.randrange(len(things))
        things[i], things[j] = things[j], things[i]


def _swap_bytes(rng: random.Random, data: bytes) -> bytes:
    swapped = bytearray(data)
    _swap(rng, swapped)
    return bytes(swapped)


def _flip(rng: random.Random, data: bytes) -> bytes:
    flipped = bytearray(data)
    flipped[rng.randrange(len(data))] ^= rng.choice([1 << rng.randrange(8), rng.randrange(1, 256)])
    return bytes(flipped)


def _insert(rng: random.Random, data: bytes, more: bytes) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + more + data[place:]


def _without_span(rng: random.Random, data: bytes) -> bytes:
    begin, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:begin] + data[end:]


def _number(rng: random.Random, data: bytes) -> bytes:
    numbers = list(_NUMBER.finditer(data))
    if not numbers:
        return data
    chosen = rng.choice(numbers)
    return data[: chosen.start()] + rng.choice(_NUMBERS) + data[chosen.end() :]


def _as(encoding: str) -> Mutation:
    def encoded(rng: random.Random, data: bytes) -> bytes:
        text = data.decode("utf-8", "replace")
        place = rng.randrange(len(text) + 1)
        return f"{text[:place]}\u00e9{text[place:]}".encode(encoding, "replace")

    return encoded


MUTATIONS: dict[str, Mutation] = {
    "cut": lambda rng, data: data[: rng.randrange(len(data))],
    "a byte flipped": _flip,
    "two bytes swapped": _swap_bytes,
    "two lines swapped": _lines(_swap),
    "a line less": _lines(lambda rng, lines: lines.pop(rng.randrange(len(lines)))),
    "a line twice": _lines(
        lambda rng, lines: lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    ),
    "a span less": _without_span,
    "a NUL": lambda rng, data: _insert(rng, data, b"\0"),
    "a byte order mark": lambda rng, data: codecs.BOM_UTF8 + data,
    "CRLF": lambda rng, data: re.sub(rb"\r?\n", b"\r\n", data),
    "UTF-16": _as("utf-16"),
    "UTF-16 without its mark": _as("utf-16-le"),
    "Latin-1": _as("latin-1"),
    "another number": _number,
    "a long line": _lines(
        lambda rng, lines: lines.insert(
            rng.randrange(len(lines) + 1), rng.choice([b"x", b"7", b"[", b"a "]) * (1 << 20) + b"\n"
        )
    ),
    "empty": lambda rng, data: b"",
}


# The second readers. First, how bytes become text and lines.


def text_of(data: bytes) -> str:
    """Decodes UTF-8, or what a byte order mark names. A wrong byte of UTF-8 is one U+FFFD."""
    for mark, encoding in (
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding)
    text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    return re.sub("[\udc80-\udcff]", "\ufffd", text)


def tokens_of(data: bytes) -> int:
    """Counts the bytes of the text in UTF-8. A wrong byte stays as it is."""
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return len(text_of(data).encode())
    return len(data.removeprefix(codecs.BOM_UTF8))


def lines_of(path: Path) -> list[str]:
    """The lines of a file, without line ends and blank last lines."""
    lines = [line.rstrip("\r") for line in text_of(path.read_bytes()).split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def json_of(path: Path) -> Any:
    return json.loads(text_of(path.read_bytes()))


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text)


def read_movielens(root: Path) -> Any:
    (path,) = root.iterdir()
    separator = {"ratings.csv": ",", "ratings.dat": "::", "u.data": "\t"}[path.name]
    ratings: dict[int, list[int]] = {}
    for line in lines_of(path)[path.suffix == ".csv" :]:
        user, movie, rating, time = line.split(separator)
        ratings.setdefault(int(user), []).append(int(movie))
        assert 0 <= float(rating) < 6 and int(time) >= 0
    targets = sum(len(range(5, len(movies), 4)) for movies in ratings.values())
    return len(ratings), sorted({movie for movies in ratings.values() for movie in movies}), targets


def load_movielens(root: Path, cache: str) -> Any:
    source = movielens.open_movielens(
        str(root), cache, 0, first=5, every=4, test_fraction=0.3, valid_fraction=0.2
    )
    asked = [source.fetch(split, np.arange(source.size(split)))["target"].sum() for split in SPLITS]
    return source.metadata["users"], source.numbering.tolist(), sum(asked)


def make_movielens(name: str, separator: str, header: bool) -> Callable[[Path], Any]:
    def make(root: Path) -> None:
        rows = (FIXTURES / "movielens" / "ratings.csv").read_text().splitlines()
        (root / name).write_text(
            "".join(f"{row.replace(',', separator)}\n" for row in rows[not header :])
        )

    return make


def make_table(name: str, separator: str, header: str) -> Callable[[Path], Any]:
    def make(root: Path) -> None:
        _, *rows = (FIXTURES / "movielens" / "ratings.csv").read_text().splitlines()
        lines = [header, *rows]
        (root / name).write_text("".join(f"{line.replace(',', separator)}\n" for line in lines))

    return make


def read_table(root: Path) -> Any:
    (path,) = root.iterdir()
    split = lambda line: line.split("," if path.suffix == ".csv" else "\t")
    head, *lines = [split(line) for line in lines_of(path) if line]
    places = [[n.split(":")[0] for n in head].index(n) for n in ("user", "item", "timestamp")]
    assert all(len(line) == len(head) for line in lines)
    users, items, times = zip(*([line[place] for place in places] for line in lines), strict=True)
    assert all(users) and all(items) and not any("\ufffd" in id_ for id_ in users + items)
    events = {
        (user, item, float(time)) for user, item, time in zip(users, items, times, strict=True)
    }
    assert all(abs(time) < float("inf") for *_, time in events)
    number = re.compile(r"(0|-?[1-9][0-9]{0,17})")
    ids = sorted(map(int, {*items}) if all(map(number.fullmatch, items)) else {*items})
    long = collections.Counter(user for user, *_ in events).values()
    return len({*users}), ids, sum(len(range(5, count, 4)) for count in long)


def load_table(root: Path, cache: str) -> Any:
    columns, options = dict(user="user", item="item"), dict(first=5, every=4, segment_length=5)
    fractions = dict(test_fraction=0.3, valid_fraction=0.2)
    source = table.open_table(
        next(root.iterdir()), **columns, **options, **fractions, cache_dir=cache
    )
    asked = sum(len(asked.rows) for asked in source.asked.values())
    return len(source.events.user_keys), source.numbering.tolist(), asked


def read_xlong(root: Path) -> Any:
    def parts(name: str) -> list:
        fields = (line.split("\t") for line in lines_of(root / name))
        return sorted((sum(map(int, f[2].split(","))), int(f[3]), int(f[4])) for f in fields)

    return [parts(f"{split}_corpus_total_dual.txt") for split in ("train", "test")]


def load_xlong(root: Path, cache: str) -> Any:
    source = xlong.open_xlong(str(root), cache, 0)

    def parts(*splits: str) -> list:
        examples = [source.fetch(split, np.arange(source.size(split))) for split in splits]
        rows = [(e["items"].sum(1, dtype=np.int64), *e["query"].T) for e in examples]
        return sorted(
            tuple(map(int, row)) for columns in rows for row in zip(*columns, strict=True)
        )

    return [parts("train", "valid"), parts("test")]


BABI = "tasks_1-20_v1-2"
BABI_FILES = (
    *(f"en-valid-10k/qa1_{split}.txt" for split in SPLITS),
    *(
        "en-10k/qa3_three-supporting-facts_train.PARTIAL-3.txt",
        "en-10k/qa3_three-supporting-facts_test.txt",
    ),
    *("en-10k/qa8_lists-sets_train.txt", "en-10k/qa8_lists-sets_test.txt"),
)


def _babi(texts: dict[str, bytes]) -> Any:
    stories, questions, answers = 0, 0, set()
    for name in BABI_FILES:
        lines = [line.rstrip("\r") for line in text_of(texts[name]).rstrip().split("\n")]
        assert all(re.match(r"\d+ \S", line, re.ASCII) for line in lines), name
        stories += sum(line.startswith("1 ") or int(line.split(" ")[0]) == 1 for line in lines)
        asked = [line.split("\t")[1].strip() for line in lines if "\t" in line]
        questions, answers = questions + len(asked), answers.union(asked)
    return stories, questions, len(answers)


def read_babi(root: Path) -> Any:
    return _babi({name: (root / BABI / name).read_bytes() for name in BABI_FILES})


def read_babi_archive(root: Path) -> Any:
    (path,) = root.iterdir()
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = [member for member in archive if member.isreg()]
        texts = {
            member.name.removeprefix(f"{BABI}/"): archive.extractfile(member).read()
            for member in members
        }
    return _babi(texts)


def load_babi(root: Path, cache: str) -> Any:
    archives = [path for path in root.iterdir() if path.is_file()]
    source = babi.open_babi(str(*archives or [root]), cache, tasks="1,3,8")
    examples = [source.fetch(split, np.arange(source.size(split))) for split in SPLITS]
    asked = sum(int(e["query_mask"].sum()) for e in examples)
    return sum(map(source.size, SPLITS)), asked, len(source.classes)


def make_babi(archive: str = "") -> Callable[[Path], Any]:
    def make(root: Path) -> None:
        if not archive:
            for name in BABI_FILES:
                (root / BABI / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(FIXTURES / "babi" / BABI / name, root / BABI / name)
            return
        with tarfile.open(root / archive, "w:gz" if archive.endswith("gz") else "w") as file:
            for name in BABI_FILES:
                file.add(FIXTURES / "babi" / BABI / name, f"{BABI}/{name}")

    return make


def read_narrativeqa(root: Path) -> Any:
    def rows(name: str) -> list[dict[str, str]]:
        text = "".join(f"{line}\n" for line in lines_of(root / name))
        return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))

    documents_of, asked = (
        {row["document_id"]: row for row in rows("documents.csv")},
        rows("qaps.csv"),
    )
    known = {row["document_id"] for row in rows("third_party/wikipedia/summaries.csv")}
    sizes = {split: [0, 0] for split in SPLITS}
    for name in {row["document_id"] for row in asked}:
        assert name in known
        questions = sum(row["document_id"] == name for row in asked)
        sizes[documents_of[name]["set"]][0] += 1
        sizes[documents_of[name]["set"]][1] += questions
    return sizes


def sizes_of(source: Any) -> Any:
    """{split: [stories, questions]}."""
    masks = {
        split: source.fetch(split, np.arange(source.size(split)))["query_mask"] for split in SPLITS
    }
    return {split: [len(mask), int(mask.sum())] for split, mask in masks.items()}


def read_tvqa(root: Path) -> Any:
    def rows(name: str) -> list[dict]:
        return [json.loads(line) for line in lines_of(root / name)]

    train, test = rows("tvqa_train.jsonl"), rows("tvqa_val.jsonl")
    lines = {row["vid_name"]: row["sub"] for row in rows("tvqa_preprocessed_subtitles.jsonl")}
    assert all(isinstance(line["text"], str) for of_clip in lines.values() for line in of_clip)
    spoken = {
        clip
        for clip, of_clip in lines.items()
        if words_of(" ".join(line["text"] for line in of_clip))
    }
    return [
        [len(clips := {row["vid_name"] for row in part}), len(part), len(clips - spoken)]
        for part in (train, test)
    ]


def load_tvqa(root: Path, cache: str) -> Any:
    source = tvqa.open_tvqa(str(root), cache, 3)
    rows = [
        [*sizes, source.metadata["without_subtitles"][split]]
        for split, sizes in sizes_of(source).items()
    ]
    return [[a + b for a, b in zip(*rows[:2], strict=True)], rows[2]]


def read_stories(root: Path) -> Any:
    sizes = {}
    for split in SPLITS:
        rows = [json.loads(line) for line in lines_of(root / f"{split}.jsonl")]
        asked = [question for row in rows for question in row["questions"]]
        assert all(words_of(q["question"]) and q["answer"].strip() for q in asked)
        sizes[split] = [len(rows), len(asked)]
    return sizes


def load_stories(root: Path, cache: str) -> Any:
    return sizes_of(jsonl.open_stories(str(root), cache))


def read_activitynet(root: Path) -> Any:
    counts = {}
    for ours, theirs in (("train", "train"), ("valid", "val"), ("test", "test")):
        questions, answers = (json_of(root / f"{theirs}_{kind}.json") for kind in "qa")
        ids = {answer["question_id"] for answer in answers}
        assert all(question["question_id"] in ids for question in questions)
        counts[ours] = [len({question["video_name"] for question in questions}), len(questions)]
    return counts


def load_questions(root: Path, cache: str) -> Any:
    counts = activitynet.question_only(str(root), cache).metadata["counts"]
    return {
        split: [of_split["videos"], of_split["questions"]] for split, of_split in counts.items()
    }


VIDEO = "v_abcdefghijk"  # all questions of the fixture are about this video


def make_features(suffix: str) -> Callable[[Path], Any]:
    array = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)

    def make(root: Path) -> None:
        path = root / f"{VIDEO}{suffix}"
        if suffix == ".npy":
            np.save(path, array)
        elif suffix == ".npz":
            np.savez(path, features=array)
        else:
            path = path if suffix == ".h5" else root / "all.hdf5"
            with h5py.File(path, "w") as file:
                place = file if suffix == ".h5" else file.create_group(VIDEO)
                place["c3d_features"] = array

    return make


def _npy(data: bytes) -> list:
    assert data[:6] == b"\x93NUMPY" and data[6] in (1, 2)
    begin = 10 if data[6] == 1 else 12
    end = begin + int.from_bytes(data[8:begin], "little")
    header = ast.literal_eval(data[begin:end].decode("latin-1").strip())
    count = int(np.prod(header["shape"]))
    array = np.frombuffer(data, header["descr"], count, end)
    return array.reshape(header["shape"], order="F" if header["fortran_order"] else "C").tolist()


def read_features(root: Path) -> Any:
    (path,) = root.iterdir()
    if path.suffix == ".npy":
        return _npy(path.read_bytes())
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            (member,) = archive.namelist()
            return _npy(archive.read(member))
    with h5py.File(path) as file:
        group = file if path.suffix == ".h5" else file[VIDEO]
        return group[next(iter(group))][()].tolist()


def load_features(root: Path, cache: str) -> Any:
    """The questions are prepared once, since only the features change."""
    features = next(root.iterdir()) if (root / "all.hdf5").exists() else root
    source = activitynet.open_activitynet(
        str(FIXTURES / "activitynet-qa"),
        str(features),
        str(root.parent / "questions"),
        segment_length=4,
        frames=64,
    )
    example = source.fetch("test", np.array([0]))
    return example["items"][example["item_mask"]].tolist()


def read_hyperpartisan(root: Path) -> Any:
    articles, truth, splits = sorted(root.iterdir())

    def elements(path: Path) -> list:
        return minidom.parseString(path.read_bytes()).getElementsByTagName("article")

    labels = {int(e.getAttribute("id")): e.getAttribute("hyperpartisan") for e in elements(truth)}
    ids = [int(e.getAttribute("id")) for e in elements(articles)]
    assert len(ids) == len({*ids}) and all(labels[i] in ("true", "false") for i in ids)
    listed = json_of(splits)
    assert all(type(i) is int for name in ("train", "dev", "test") for i in listed[name])
    test = sorted({*ids} - {*listed["train"], *listed["dev"]})
    parts = dict(zip(SPLITS, (listed["train"], listed["dev"], test), strict=True))
    return {
        split: [(i, labels[i] == "true") for i in of_split] for split, of_split in parts.items()
    }


def load_hyperpartisan(root: Path, cache: str) -> Any:
    source = hyperpartisan.open_hyperpartisan(str(root), cache, segment_length=9)
    targets = {
        split: source.fetch(split, np.arange(source.size(split)))["target"][:, 0]
        for split in SPLITS
    }
    return {
        split: [(i, bool(t)) for i, t in zip(source.ids[split], targets[split], strict=True)]
        for split in SPLITS
    }


def read_wikitext(root: Path) -> Any:
    parts = {}
    for split in SPLITS:
        path = root / f"wiki.{split}.tokens"
        data = path.read_bytes()
        text = text_of(data)
        lines = ["", *(line.removesuffix("\r") for line in text.split("\n")), ""]
        titles = [
            (number, match[1])
            for number in range(1, len(lines) - 1)
            if (match := re.fullmatch(r" = ([^=]|[^=].*[^=]) = ", lines[number]))
            and not lines[number - 1].strip()
            and not lines[number + 1].strip()
        ]
        first = titles[0][0] if titles else len(lines)
        before = [path.name] if not titles or "".join(lines[:first]).strip() else []
        parts[split] = (
            [*before, *(title for _, title in titles)],
            tokens_of(data),
            _words(text) + text.count("\n"),
        )
    return parts


def _words(text: str) -> int:
    return len(re.findall(r"\S+", text))


def read_pg19(root: Path) -> Any:
    rows = csv.reader(io.StringIO(text_of((root / "metadata.csv").read_bytes()), newline=""))
    titles = {row[0]: row[1] for row in rows if len(row) == 4}
    parts = {}
    for split, folder in zip(SPLITS, ("train", "validation", "test"), strict=True):
        (book,) = (root / folder).iterdir()
        data = book.read_bytes()
        parts[split] = [titles.get(book.stem, book.stem)], tokens_of(data), _words(text_of(data))
    return parts


def load_documents(kind: str, tokenizer: str = "bytes") -> Callable[[Path, str], Any]:
    def load(root: Path, cache: str) -> Any:
        parts = documents(
            kind, str(root), cache, tokenizer, **({"train_share": 1.0} if kind == "pg19" else {})
        )
        if kind == "enwik8":
            return [len(parts[split].tokens) for split in SPLITS]
        if kind == "books":
            return sum(len(parts[split].tokens) for split in SPLITS), sum(
                part.words for part in parts.values()
            )
        return {split: (part.names, len(part.tokens), part.words) for split, part in parts.items()}

    return load


def read_enwik8(root: Path) -> Any:
    (path,) = root.iterdir()
    size = path.stat().st_size
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            size = len(archive.read("enwik8"))
    cuts = [0, size * 18 // 20, size * 19 // 20, size]
    assert all(a < b for a, b in itertools.pairwise(cuts))
    return [b - a for a, b in itertools.pairwise(cuts)]


def make_enwik8(archive: bool) -> Callable[[Path], Any]:
    def make(root: Path) -> None:
        data = b"".join(
            (FIXTURES / "wikitext" / f"wiki.{split}.tokens").read_bytes() for split in SPLITS
        )
        if not archive:
            (root / "enwik8").write_bytes(data)
            return
        with zipfile.ZipFile(root / "enwik8.zip", "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(zipfile.ZipInfo("enwik8"), data, zipfile.ZIP_DEFLATED)

    return make


def make_books(root: Path) -> None:
    for number, split in enumerate((*SPLITS, "valid")):
        shutil.copy(FIXTURES / "wikitext" / f"wiki.{split}.tokens", root / f"{number}.txt")


def read_books(root: Path) -> Any:
    texts = [text_of(path.read_bytes()) for path in root.iterdir()]
    assert all(texts) and "\0" not in "".join(texts)
    return sum(map(len, texts)), sum(map(_words, texts))


VOCABULARY = ("<unk>", "lamp", "door", "key", "mill", "barn", "gate")


def make_vectors(suffix: str, header: bool) -> Callable[[Path], Any]:
    def make(root: Path) -> None:
        rng = random.Random(0)
        words = ["the", "lamp", ". . .", "a@b c", "Door", "door", "mill", "barn", "x", "gate"]
        lines = [" ".join([word, *(f"{rng.gauss(0, 1):.4f}" for _ in range(4))]) for word in words]
        data = "\n".join([*([f"{len(words)} 4"] if header else []), *lines, ""]).encode()
        (root / f"vectors.txt{suffix}").write_bytes(
            gzip.compress(data, mtime=0) if suffix else data
        )

    return make


def read_vectors(root: Path) -> Any:
    (path,) = root.iterdir()
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    lines = [line.rstrip() for line in data.removeprefix(codecs.BOM_UTF8).split(b"\n")]
    lines = lines if lines[-1] else lines[:-1]
    first = lines[0].split()
    header = len(first) == 2 and all(field.isdigit() for field in first)
    width, vectors_of = int(first[1]) if header else len(first) - 1, {}
    for line in lines[header:]:
        word, *values = line.split(b" ")
        if len(values) != width:
            assert len(values) > width, line
            continue
        for name in {word.decode("utf-8", "replace"), word.decode("utf-8", "replace").lower()} & {
            *VOCABULARY
        }:
            assert all(
                re.fullmatch(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value) for value in values
            ), line
            exact = name.encode() == word
            if name not in vectors_of or exact > vectors_of[name][0]:
                vectors_of[name] = exact, [float(np.float32(value)) for value in values]
    assert vectors_of and all(np.isfinite(row).all() for _, row in vectors_of.values())
    return {name: row for name, (_, row) in vectors_of.items()}


def load_vectors(root: Path, cache: str) -> Any:
    (path,) = root.iterdir()
    table, known = vectors.read_vectors(str(path), VOCABULARY)
    rows = zip(VOCABULARY, table, known, strict=True)
    return {name: row.tolist() for name, row, present in rows if present}


def make_tokenizer(root: Path) -> None:
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "lamp": 1, "door": 2}, unk_token="<unk>")
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(["[CLS]"])
    model.save(str(root / "tokenizer.json"))


def make_bpe(root: Path) -> None:
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator(["the lamp the door the key of the lamp"] * 9, vocab_size=270)
    model.save(str(root / "tokenizer.json"), pretty=False)


def read_tokenizer(root: Path) -> Any:
    content = json_of(root / "tokenizer.json")
    ids = {
        **content["model"]["vocab"],
        **{token["content"]: token["id"] for token in content["added_tokens"]},
    }
    return sorted(ids.items())


def load_tokenizer(root: Path, cache: str) -> Any:
    made = our_tokenizers.make_tokenizer(str(root))
    made.decode(made.encode("a lamp, the door"))
    return sorted(
        (token, i) for i, token in enumerate(made.vocabulary) if token != f"<no token {i}>"
    )


SIZES = dict(vocabulary=11, positions=8, dim=4, layers=1, heads=2, dropout=0.0)
CONFIG = dict(model_type="gpt2", vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=2)
CONFIG |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
LIKE = jax.eval_shape(gpt2.make(gpt2.Sizes(**SIZES)).init, jax.random.key(0))


def make_checkpoint(shards: int) -> Callable[[Path], Any]:
    def make(root: Path) -> None:
        rng = np.random.default_rng(0)
        huggingface.write(
            root, jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), LIKE), "gpt2"
        )
        if shards == 1:
            return
        arrays, index = _safetensors(root / "model.safetensors"), {}
        for shard in range(shards):
            part = {name: arrays[name] for name in list(arrays)[shard::shards]}
            name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            save_file(part, root / name)
            index |= dict.fromkeys(part, name)
        (root / "model.safetensors").unlink()
        (root / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index}, indent=1)
        )

    return make


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8 : 8 + size]), data[8 + size :]
    arrays, end = {}, 0
    for name, entry in header.items():
        if name != "__metadata__":
            begin, last = entry["data_offsets"]
            kind = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}[entry["dtype"]]
            arrays[name] = np.frombuffer(tensors[begin:last], kind).reshape(entry["shape"])
            end = max(end, last)
    assert end == len(tensors)
    return arrays


def read_checkpoint(root: Path) -> Any:
    index = root / "model.safetensors.index.json"
    if not index.exists():
        arrays = _safetensors(root / "model.safetensors")
    else:
        arrays = {
            name: _safetensors(root / shard)[name]
            for name, shard in json_of(index)["weight_map"].items()
        }
    assert all(np.isfinite(array).all() for array in arrays.values())
    return sorted(np.concatenate([array.ravel() for array in arrays.values()]).tolist())


def load_checkpoint(root: Path, cache: str) -> Any:
    params = huggingface.read(root, LIKE, "gpt2")
    return sorted(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)]).tolist())


FIELDS = dict(
    vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12, resid_pdrop=0.1
)
OTHERS = dict(hidden_size="n_embd", max_position_embeddings="n_positions")
OTHERS |= dict(num_attention_heads="n_head", num_hidden_layers="n_layer")


def read_sizes(root: Path) -> Any:
    content = {
        OTHERS.get(name, name): value for name, value in json_of(root / "config.json").items()
    }
    return [content.get(name, default) for name, default in FIELDS.items()]


def load_sizes(root: Path, cache: str) -> Any:
    s = huggingface.sizes_from_config(root, "gpt2")
    return [s.vocabulary, s.positions, s.dim, s.layers, s.heads, s.dropout]


def sums_hold(folder: Path) -> None:
    """Raises AssertionError unless SHA256SUMS has the digests of all files."""
    lines = (folder / "SHA256SUMS").read_bytes().decode().split("\n")
    listed = {line[66:]: line[:64] for line in lines[:-1]}
    files = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    del files["SHA256SUMS"]
    assert {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()
    } == listed


def make_streams(root: Path) -> None:
    store = streams()
    store.write(["ann", "bob"], [[3, 4, 5], [1]])
    store.save(root / "saved")


def read_streams(root: Path) -> Any:
    sums_hold(root / "saved")
    return json_of(root / "saved" / "manifest.json")["streams"]["users"]


def load_streams(root: Path, cache: str) -> Any:
    store = streams()
    store.load(root / "saved")
    return [user for user in ("ann", "bob") if user in store]


MEMORIA = small()


def make_memoria(root: Path) -> None:
    memoria.save(MEMORIA, memoria.fork(memoria.init(MEMORIA), 2), root / "saved")


def read_memoria(root: Path) -> Any:
    sums_hold(root / "saved")
    return json_of(root / "saved" / "manifest.json")["leaves"]["evicted"][1]


def make_config(root: Path) -> None:
    cards = json.loads(config.base().to_json())
    cards["data"]["found"] = {"source": "SimulatedClicks", "items": 10}
    (root / "config.json").write_text(json.dumps(cards, indent=1))


def read_config(root: Path) -> Any:
    """All values. A missing key has its default."""
    content = json_of(root / "config.json")
    content["data"].pop("found", None)
    values = {name: field.default for name, field in config.SCHEMA.items()} | kept.flat(content)
    return sorted((name, value) for name, value in values.items() if name != "digest")


def load_config(root: Path, cache: str) -> Any:
    return sorted(kept.flat(kept.read_config(root)[0].to_dict()).items())


def copied(name: str) -> Callable[[Path], Any]:
    return lambda root: shutil.copytree(FIXTURES / name, root, dirs_exist_ok=True)


@dataclasses.dataclass(frozen=True)
class Loader:
    make: Callable[[Path], Any]  # fills a folder
    load: Callable[[Path, str], Any]  # (folder, cache folder) -> what the loader gives
    read: Callable[[Path], Any]  # folder -> the same, from the second reader


LOADERS = {
    **{
        f"movielens {name}": Loader(make_movielens(name, *how), load_movielens, read_movielens)
        for name, how in movielens.FORMATS.items()
    },
    "table .csv": Loader(
        make_table("events.csv", ",", "user,item,rating,timestamp"), load_table, read_table
    ),
    "table .inter": Loader(
        make_table("events.inter", "\t", "user:token,item:token,rating:float,timestamp:float"),
        load_table,
        read_table,
    ),
    "xlong": Loader(copied("xlong"), load_xlong, read_xlong),
    "babi": Loader(make_babi(), load_babi, read_babi),
    "babi .tar.gz": Loader(make_babi("babi.tar.gz"), load_babi, read_babi_archive),
    "babi .tar": Loader(make_babi("babi.tar"), load_babi, read_babi_archive),
    "narrativeqa": Loader(
        copied("narrativeqa"),
        lambda root, cache: sizes_of(narrativeqa.open_narrativeqa(str(root), cache)),
        read_narrativeqa,
    ),
    "tvqa": Loader(copied("tvqa"), load_tvqa, read_tvqa),
    "stories": Loader(copied("stories"), load_stories, read_stories),
    "activitynet questions": Loader(copied("activitynet-qa"), load_questions, read_activitynet),
    **{
        f"activitynet {suffix}": Loader(make_features(suffix), load_features, read_features)
        for suffix in (".npz", ".npy", ".h5", ".hdf5")
    },
    "hyperpartisan": Loader(write_hyperpartisan, load_hyperpartisan, read_hyperpartisan),
    "wikitext": Loader(copied("wikitext"), load_documents("wikitext"), read_wikitext),
    "pg19": Loader(copied("pg19"), load_documents("pg19"), read_pg19),
    "enwik8": Loader(make_enwik8(False), load_documents("enwik8"), read_enwik8),
    "enwik8 .zip": Loader(make_enwik8(True), load_documents("enwik8"), read_enwik8),
    "books": Loader(make_books, load_documents("books", "characters"), read_books),
    "vectors": Loader(make_vectors("", False), load_vectors, read_vectors),
    "vectors with a header": Loader(make_vectors("", True), load_vectors, read_vectors),
    "vectors .gz": Loader(make_vectors(".gz", False), load_vectors, read_vectors),
    "tokenizer.json": Loader(make_tokenizer, load_tokenizer, read_tokenizer),
    "tokenizer.json of a BPE": Loader(make_bpe, load_tokenizer, read_tokenizer),
    "checkpoint": Loader(make_checkpoint(1), load_checkpoint, read_checkpoint),
    "checkpoint in shards": Loader(make_checkpoint(2), load_checkpoint, read_checkpoint),
    "checkpoint's config.json": Loader(
        lambda root: (root / "config.json").write_text(json.dumps(CONFIG, indent=1)),
        load_sizes,
        read_sizes,
    ),
    "streams": Loader(make_streams, load_streams, read_streams),
    "memoria": Loader(
        make_memoria,
        lambda root, cache: list(memoria.load(MEMORIA, root / "saved").evicted.shape),
        read_memoria,
    ),
    "config.json": Loader(make_config, load_config, read_config),
}


# Cases.

_UNREAD = ("graph_emb.txt", "wiki.valid.raw")  # files of the fixtures that no loader opens
_LEFT = ("incomplete*", ".making*", "*.tmp")  # a failed preparation may not leave these


@dataclasses.dataclass
class Bench:
    """The files of a loader. A case changes one of them."""

    name: str
    root: Path

    def __post_init__(self):
        (self.root / "data").mkdir()
        LOADERS[self.name].make(self.root / "data")
        self.files = sorted(path for path in (self.root / "data").rglob("*") if path.is_file())
        self.files = [path for path in self.files if path.name not in _UNREAD]

    def case(self, number: int) -> tuple[str, str]:
        """Returns 'refused', 'equal' or the fault; and a name of the case."""
        rng, loader = random.Random(f"{self.name} {number}"), LOADERS[self.name]
        kind, path = list(MUTATIONS)[number % len(MUTATIONS)], rng.choice(self.files)
        data, cache = path.read_bytes(), self.root / "cache"
        path.write_bytes(MUTATIONS[kind](rng, data))
        try:
            outcome = self._outcome(loader, cache)
        finally:
            path.write_bytes(data)
            shutil.rmtree(cache, ignore_errors=True)
        return outcome, f"{self.name!r}, {number}: {path.name}, {kind}"

    def _outcome(self, loader: Loader, cache: Path) -> str:
        """Returns 'refused', 'equal' or the fault."""
        try:
            wanted = loader.read(self.root / "data")
        except Exception as error:
            wanted = error
        try:
            with _bounds():
                actual = loader.load(self.root / "data", str(cache))
        except NAMED as error:
            words = str(error).replace(str(self.root), "")
            if not any(path.name in words for path in self.files):
                return f"no file in the error: {type(error).__name__}: {words[:600]}"
            if not re.search(f"{PLACES}|{WHOLE}", words):
                return f"no place in the error: {type(error).__name__}: {words[:600]}"
            actual = None
        except (Exception, Hangs) as error:
            return "".join(traceback.format_exception(error)[-4:])
        left = [str(path) for pattern in _LEFT for path in cache.rglob(pattern)]
        if left:
            return f"left over: {left}"
        if actual is None:
            return "refused"
        if isinstance(wanted, Exception):
            return f"accepted, but the second reader: {wanted!r}; {str(actual)[:300]}"
        return "equal" if actual == wanted else f"other than read: {_differ(actual, wanted)}"


def _differ(actual: Any, wanted: Any) -> str:
    return f"\n     {str(actual)[:300]}\n     {str(wanted)[:300]}"


@contextlib.contextmanager
def _bounds() -> Iterator[None]:
    """Limits the time and memory of a case."""

    def ring(*_):
        raise Hangs

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    handler, memory = signal.signal(signal.SIGALRM, ring), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, memory[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, memory)


def repeat(name: str, number: int) -> None:
    """Prints the outcome of one case."""
    with tempfile.TemporaryDirectory() as folder:
        print(*reversed(Bench(name, Path(folder)).case(number)), sep="\n")


TABLE: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def shown():
    """Prints a table of the cases of this process at the end."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    print("\n| loader | cases | refused | accepted, equal |\n|---|---|---|---|", *TABLE, sep="\n")


def fuzz(name: str, root: Path, numbers: range) -> None:
    bench = Bench(name, root)
    outcomes = [bench.case(number) for number in numbers]
    refused, equal = (
        sum(outcome == kind for outcome, _ in outcomes) for kind in ("refused", "equal")
    )
    TABLE.append(f"| {name} | {len(outcomes)} | {refused} | {equal} |")
    faults = [
        f"{case}\n  {outcome}" for outcome, case in outcomes if outcome not in ("refused", "equal")
    ]
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults)


@pytest.mark.parametrize("name", LOADERS)
def test_a_few_damaged_files_are_read_equally_or_refused_by_name(tmp_path, name):
    begin = list(LOADERS).index(name)  # so the mutations differ from loader to loader
    fuzz(name, tmp_path, range(begin, begin + 200, 41))


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADERS)
def test_damaged_files_are_read_equally_or_refused_by_name(tmp_path, name):
    fuzz(name, tmp_path, range(200))
