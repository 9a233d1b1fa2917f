"""Hyperpartisan news (SemEval-2019 task 4, by article; Kiesel et al. 2019): does an article follow one side blindly?

Of the split in wide use (Longformer, Beltagy et al. 2020) 51 of the 65 test articles are in train and 7 in dev, while
65 of the 645 are in neither: these are 'test' here, unless it is asked for as published.
"""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import numpy as np
from absl import logging

from rmjax.data import records
from rmjax.data.source import Examples, Source
from rmjax.data.stories.text import Story, TextBuilder, TextRecords
from rmjax.data.texts import tokenizers
from rmjax.io import paths
from rmjax.io.progress import watch
from rmjax.io.text import read_json
from rmjax.registry import a_path, at_least, one_of, setting

CLASSES = ("false", "true")  # is it hyperpartisan
_DIGITS = 18  # of an id: more do not fit 64 bits
MARKS = (("[CLS]", "<s>"), ("[SEP]", "</s>"))  # before and after a segment, by their names
_RELEASE = (
    "An archive of that name is at https://doi.org/10.5281/zenodo.1489920. The task is described at "
    "https://pan.webis.de/semeval19/semeval19-web."
)
ADVICE = {
    "articles-training-byarticle-*.xml": _RELEASE,
    "ground-truth-training-byarticle-*.xml": _RELEASE,
    "*hp-splits.json": "It is scripts/hp-splits.json of https://github.com/allenai/longformer.",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which articles are the test, and what is read of one."""

    task: ClassVar[str] = "documents"

    split: str = setting("unseen", one_of("unseen", "published"), "which articles are the test")
    tokenizer: str = setting("words", a_path, "'words', or the path of a tokenizer.json")
    title: bool = setting(True, doc="an article's title is its first sentence")
    max_segments: int = setting(0, at_least(0), "first segments kept of an article; 0: all")


def make(settings: Settings, common: Any, seed: int) -> Source:
    options = dict(
        segment_length=common.segment_length, min_count=common.min_count, buckets=common.buckets
    )
    return open_hyperpartisan(common.dir, common.cache_dir, **options, **vars(settings))


def open_hyperpartisan(
    directory: str,
    cache_dir: str,
    *,
    segment_length: int = 512,
    split: str = "unseen",
    tokenizer: str = "words",
    min_count: int = 2,
    title: bool = True,
    max_segments: int = 0,
    buckets: int = 6,
) -> Hyperpartisan:
    """The source. An example is an article, asked at its end for one of two classes.

    A segment is [CLS], up to `segment_length` - 2 tokens of the article (`title` first) and [SEP]; `max_segments`
    (0: all) keeps the first of an article. `split` is 'unseen' or 'published', see above; train and dev are as
    published in both. `tokenizer` is 'words', of which those rarer than `min_count` in 'train' are '<unk>', or the path
    of a tokenizer.json; the two marks have its ids of [CLS] and [SEP] or of <s> and </s>, or else two more.

    Raises:
      FileNotFoundError: `directory` has not all three files, or there is no such tokenizer.
      ValueError: a file is cut short or not of the format; an article has no label; a split names an article that is
        not there, or is empty; an option out of range.
    """
    if segment_length < 3 or max_segments < 0:
        raise ValueError(
            f"segment_length={segment_length}, max_segments={max_segments}: expected 3 or more and 0 or more"
        )
    if split not in ("unseen", "published"):
        raise ValueError(f"split={split!r}: expected 'unseen' or 'published'")
    files = tuple(_find(directory, pattern) for pattern in ADVICE)
    parameters = dict(
        segment_length=segment_length, split=split, title=title, max_segments=max_segments
    )
    parameters |= dict(
        min_count=min_count, tokenizer=tokenizer, tokens=tokenizers.identity(tokenizer)
    )
    prepared = records.prepare(HyperpartisanBuilder, cache_dir, files=files, parameters=parameters)
    source = Hyperpartisan(prepared, segment_length, buckets)
    if split == "published":
        seen = [
            len(set(source.ids["test"]) & set(source.ids[other])) for other in ("train", "valid")
        ]
        message = "Hyperpartisan's published split: of its %d test articles %d are in train and %d in dev."
        logging.warning(message, source.size("test"), *seen)
    return source


class Hyperpartisan(TextRecords):
    """`ids` {split: the articles' ids}; `classes` are the labels by number."""

    def __init__(self, directory: Path, segment_length: int, buckets: int):
        settings: dict[str, Any] = dict(segment_length=segment_length, buckets=buckets)
        super().__init__(directory, metric="accuracy", positions_at_end=True, **settings)
        self.questions = self.questions._replace(query="kind", kinds=1, f1=True)
        self.ids: dict[str, list[int]] = self.metadata["ids"]

    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        """As `Source.fetch`, in segments."""
        examples = super().fetch(split, indices)
        del examples["word_mask"]
        return examples | {"query": np.zeros((len(indices), 1), np.int32)}

    def references(self, split: str) -> dict[str, np.ndarray]:
        """I [size, 1], the more frequent class of 'train'."""
        targets = self.fetch("train", np.arange(self.size("train")))["target"]
        return {"majority": np.full((self.size(split), 1), np.bincount(targets[:, 0]).argmax())}


class HyperpartisanBuilder(TextBuilder):
    """A sentence is a segment with its two marks."""

    name = "hyperpartisan"

    def _split_generators(self, dl_manager):
        articles, labels, splits = self.builder_config.files
        options = self.builder_config.parameters
        target = read_labels(labels)
        texts = {}
        for number, title, body in read_articles(articles):
            if number not in target:
                raise ValueError(
                    f"{articles}: article {number:07} has no label in {labels}; take both of one release"
                )
            texts[number] = f"{title} {body}".strip() if options["title"] else body
        ids = read_splits(splits, articles, texts, options["split"])
        words = watch(ids["train"], "reading the training articles for a vocabulary", "articles")
        training = (texts[number] for number in words)
        tokenizer = tokenizers.make_tokenizer(options["tokenizer"], training, options["min_count"])
        vocabulary = list(tokenizer.vocabulary)
        marks = [next((t for t in names if t in vocabulary), names[0]) for names in MARKS]
        vocabulary += [mark for mark in marks if mark not in vocabulary]
        self.info.metadata.update(classes=list(CLASSES), groups=[], vocabulary=vocabulary, ids=ids)

        def story(number: int) -> Story:
            step = options["segment_length"] - 2
            kept = step * options["max_segments"] or None
            tokens = [vocabulary[i] for i in tokenizer.encode(texts[number])[:kept]]
            segments = [
                [marks[0], *tokens[i : i + step], marks[1]]
                for i in range(0, max(len(tokens), 1), step)
            ]
            return Story(
                segments, questions=[[]], position=[len(segments)], target=[target[number]]
            )

        number_of = {token: i for i, token in enumerate(vocabulary)}
        stories = {
            split: [story(i) for i in watch(ids[split], "making tokens", "articles")]
            for split in ids
        }
        return {
            split: self._generate_examples(of_split, number_of)
            for split, of_split in stories.items()
        }


def _find(directory: str, pattern: str) -> Path:
    files = paths.visible(paths.resolve(directory, "config.data.dir"), pattern) if directory else []
    if not files:
        raise FileNotFoundError(
            f"{pattern} not found in {paths.lacks(directory, pattern)}. {ADVICE[pattern]}"
        )
    return files[-1]  # the newest, dates being in the names


def read_splits(
    path: Path, articles: Path, there: Iterable[int], split: str
) -> dict[str, list[int]]:
    """{'train', 'valid', 'test': ids}, of the articles that are `there`; `split` is as in `hyperpartisan`."""
    try:
        listed = read_json(path)
        # By their digits: int() takes 1.5, true and infinity for numbers, or fails in other ways.
        train, dev, test = (
            [int(str(number)) for number in listed[name]] for name in ("train", "dev", "test")
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: expected lists of ids 'train', 'dev' and 'test' ({error!r}). {ADVICE['*hp-splits.json']}"
        ) from error
    unknown = sorted({*train, *dev, *test}.difference(there))
    if unknown:
        raise ValueError(
            f"{path}: {len(unknown)} of its articles, first {unknown[0]}, are not in {articles}"
        )
    if split == "unseen":
        test = sorted(set(there).difference(train, dev))
    ids = dict(train=train, valid=dev, test=test)
    for name, of_split in ids.items():
        if not of_split:
            raise ValueError(
                f"{path}: no article is left for {name!r}, split={split!r}; take the whole release"
            )
    return ids


def read_articles(path: Path) -> Iterator[tuple[int, str, str]]:
    """(id, title, text) of each article, without marks of HTML and with one space where there was white space."""
    for number, element in _articles(path):
        for part in element.iter("p"):  # ends a word
            part.text, part.tail = f" {part.text or ''}", f" {part.tail or ''}"
        yield number, plain(element.get("title", "")), plain("".join(element.itertext()))


def read_labels(path: Path) -> dict[int, int]:
    """{id: class}; what else a label has is not read."""
    labels = {}
    for number, element in _articles(path):
        label = element.get("hyperpartisan")
        if label not in CLASSES:
            raise ValueError(
                f"{path}, article {number:07}, hyperpartisan: expected 'true' or 'false', found {label!r}"
            )
        labels[number] = CLASSES.index(label)
    return labels


def plain(string: str) -> str:
    """Without marks of HTML, which some articles have escaped once more, and with one space for any white space."""
    return " ".join(re.sub(r"</?[a-zA-Z][^<>]*>", " ", html.unescape(string)).split())


def _articles(path: Path) -> Iterator[tuple[int, ElementTree.Element]]:
    """(id, element) of each article, read one at a time."""
    seen: set[int] = set()
    root: ElementTree.Element | None = None
    for event, element in watch(_elements(path), f"reading {path}", "elements"):
        root = element if root is None else root
        if event == "end" and element.tag == "article":
            name = element.get("id", "")
            if not name.isdecimal() or len(name) > _DIGITS or int(name) in seen:
                place = f"{path}, article {len(seen) + 1}"
                raise ValueError(f"{place}, id: expected a number of its own, found {name[:60]!r}")
            seen.add(int(name))
            yield int(name), element
            root.clear()


def _elements(path: Path) -> Iterator[tuple[str, ElementTree.Element]]:
    """Begins and ends of a file's elements."""
    try:
        yield from ElementTree.iterparse(path, ("start", "end"))
    except ElementTree.ParseError as error:
        line = error.position[0]
        raise ValueError(
            f"{path}, line {line}: cut short, or not XML ({error}); fetch it again"
        ) from error
    except (
        LookupError,
        ValueError,
    ) as error:  # Python or its XML parser does not know the encoding
        message = f"{path}: its XML is in an encoding that is not read ({error}): save it as UTF-8"
        raise ValueError(message) from error
