"""Hyperpartisan news (SemEval-2019 task 4, by article; Kiesel et al. 2019).

The question is whether an article follows one side blindly. The split in wide use (Longformer,
Beltagy et al. 2020) leaks. 51 of its 65 test articles are also in train and 7 are in dev. 65 of the
645 articles are in neither. Those are 'test' here, unless the published split is asked for.
"""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar
from xml.etree import ElementTree

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from rmjax.data import records
from rmjax.data.shares import log_source
from rmjax.data.source import Examples, Source
from rmjax.data.stories.text import Story, TextBuilder, TextRecords
from rmjax.data.texts import tokenizers
from rmjax.io import paths
from rmjax.io.progress import watch
from rmjax.io.text import read_json
from rmjax.registry import a_path, at_least, one_of, setting

CLASSES = ("false", "true")  # whether an article is hyperpartisan
_DIGITS = 18  # most digits of an id; more do not fit 64 bits
MARKS = (("[CLS]", "<s>"), ("[SEP]", "</s>"))  # names of the marks before and after a segment
_RELEASE = (
    "An archive of this name is at https://doi.org/10.5281/zenodo.1489920. "
    "https://pan.webis.de/semeval19/semeval19-web describes the task."
)
ADVICE = {
    "articles-training-byarticle-*.xml": _RELEASE,
    "ground-truth-training-byarticle-*.xml": _RELEASE,
    "*hp-splits.json": "The file is scripts/hp-splits.json of https://github.com/allenai/longformer.",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The test articles, and the part of an article that is read."""

    task: ClassVar[str] = "documents"

    split: str = setting(
        "unseen", one_of("unseen", "published"), "which articles form the test split"
    )
    tokenizer: str = setting("words", a_path, "'words', or the path of a tokenizer.json")
    title: bool = setting(True, doc="read the title before the article")
    max_segments: int = setting(
        0, at_least(0), "number of first segments kept of an article; 0: all"
    )


def make(settings: Settings, common: ConfigDict, seed: int) -> Source:
    """Opens the source, see `rmjax.Source`."""
    options = {key: common[key] for key in ("segment_length", "min_count", "buckets")}
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
    """Opens the source. An example is an article, which is asked at its end for one of two classes.

    A segment is [CLS], up to `segment_length` - 2 tokens of the article, and [SEP]. The two marks
    have the tokenizer's ids of [CLS] and [SEP], or of <s> and </s>; if it has neither, they get new
    ids.

    Args:
      directory: the folder of the three files.
      cache_dir: the folder for prepared data; '' means `paths.cache('')`.
      segment_length: N, tokens of a segment.
      split: 'unseen' or 'published', see the module; train and dev are as published in both.
      tokenizer: 'words', or another name that `make_tokenizer` takes.
      min_count: words that occur less often in 'train' become '<unk>'.
      title: whether the title is read before the article.
      max_segments: number of first segments that are kept of an article; 0: all.
      buckets: number of batch lengths, see `Source.buckets`.

    Returns:
      The source.

    Raises:
      FileNotFoundError: `directory` lacks a file, or the tokenizer does not exist.
      ValueError: a file is cut short or malformed; an article has no label; a split is empty or
        names an unknown article; an option is out of range.
    """
    if segment_length < 3 or max_segments < 0:
        options = f"segment_length={segment_length}, max_segments={max_segments}"
        raise ValueError(f"{options}: expected 3 or more and 0 or more")
    if split not in ("unseen", "published"):
        raise ValueError(f"split={split!r}: expected 'unseen' or 'published'")
    files = tuple(_find(directory, pattern) for pattern in ADVICE)
    parameters: dict[str, object] = dict(segment_length=segment_length, split=split, title=title)
    parameters |= dict(max_segments=max_segments, min_count=min_count, tokenizer=tokenizer)
    parameters |= dict(tokens=tokenizers.identity(tokenizer))
    prepared = records.prepare(HyperpartisanBuilder, cache_dir, files=files, parameters=parameters)
    source = Hyperpartisan(prepared, segment_length, buckets)
    if split == "published":
        test = set(source.ids["test"])
        seen = [len(test & set(source.ids[other])) for other in ("train", "valid")]
        message = "Hyperpartisan: of its %d test articles %d are in train and %d in dev."
        logging.warning(message, source.size("test"), *seen)
    log_source("Hyperpartisan", source, "articles")
    return source


class Hyperpartisan(TextRecords):
    """The source that `open_hyperpartisan` returns.

    Args:
      directory: the prepared data.
      segment_length: N, tokens of a segment.
      buckets: number of batch lengths.

    Attributes:
      ids: {split: ids of the articles}.
    """

    def __init__(self, directory: Path, segment_length: int, buckets: int):
        super().__init__(
            directory,
            segment_length=segment_length,
            metric="accuracy",
            positions_at_end=True,
            buckets=buckets,
        )
        self.questions = self.questions._replace(query="kind", kinds=1, f1=True)
        self.ids: dict[str, list[int]] = self.metadata["ids"]

    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        """See `Source.fetch`; streams are in segments."""
        examples = super().fetch(split, indices)
        del examples["word_mask"]
        return examples | {"query": np.zeros((len(indices), 1), np.int32)}

    def references(self, split: str) -> dict[str, np.ndarray]:
        """Answers with the more frequent class of 'train', see `Source.references`."""
        targets = self.fetch("train", np.arange(self.size("train")))["target"]
        return {"majority": np.full((self.size(split), 1), np.bincount(targets[:, 0]).argmax())}


class HyperpartisanBuilder(TextBuilder):
    """Prepares stories whose sentences are the segments with their marks."""

    name = "hyperpartisan"

    def _split_generators(self, dl_manager):
        articles, labels, splits = self.builder_config.files
        options = self.builder_config.parameters
        target = read_labels(labels)
        texts = {}
        for number, title, body in read_articles(articles):
            if number not in target:
                cure = "take both files of one release"
                cause = f"article {number:07} has no label in {labels}"
                raise ValueError(f"{articles}: {cause}; {cure}")
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
            position = [len(segments)]
            return Story(segments, questions=[[]], position=position, target=[target[number]])

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
    """Finds the newest file that matches a pattern; names contain dates."""
    files = paths.visible(paths.resolve(directory, "config.data.dir"), pattern) if directory else []
    if not files:
        place = paths.lacks(directory, pattern)
        raise FileNotFoundError(f"{pattern} not found in {place}. {ADVICE[pattern]}")
    return files[-1]


def read_splits(
    path: Path, articles: Path, known: Iterable[int], split: str
) -> dict[str, list[int]]:
    """Reads the splits.

    Args:
      path: the file of the splits.
      articles: the file of the articles, for errors.
      known: ids of the articles.
      split: 'unseen' or 'published', see `open_hyperpartisan`.

    Returns:
      {split: ids}, for 'train', 'valid' and 'test'.

    Raises:
      ValueError: the file is malformed, names unknown articles, or leaves a split empty.
    """
    try:
        listed = read_json(path)
        # Ids are parsed from text: int() also takes 1.5 and true, and fails otherwise on infinity.
        train, dev, test = (
            [int(str(number)) for number in listed[name]] for name in ("train", "dev", "test")
        )
    except (ValueError, TypeError, KeyError) as error:
        expected = f"expected lists of ids 'train', 'dev' and 'test' ({error!r})"
        raise ValueError(f"{path}: {expected}. {ADVICE['*hp-splits.json']}") from error
    unknown = sorted({*train, *dev, *test}.difference(known))
    if unknown:
        cause = f"{len(unknown)} of its articles, first {unknown[0]}, are not in {articles}"
        raise ValueError(f"{path}: {cause}; take all files of one release")
    if split == "unseen":
        test = sorted(set(known).difference(train, dev))
    ids = dict(train=train, valid=dev, test=test)
    for name, of_split in ids.items():
        if not of_split:
            cause = f"no article is left for {name!r}, split={split!r}"
            raise ValueError(f"{path}: {cause}; take the complete release")
    return ids


def read_articles(path: Path) -> Iterator[tuple[int, str, str]]:
    """Reads the articles as plain text, see `plain`.

    Args:
      path: the file of the articles.

    Yields:
      (id, title, text) of each article.

    Raises:
      ValueError: the file is cut short, is not XML, or has a wrong id.
    """
    for number, element in _articles(path):
        for part in element.iter("p"):  # a paragraph ends a word
            part.text, part.tail = f" {part.text or ''}", f" {part.tail or ''}"
        yield number, plain(element.get("title", "")), plain("".join(element.itertext()))


def read_labels(path: Path) -> dict[int, int]:
    """Reads the labels.

    Args:
      path: the file of the labels.

    Returns:
      {id of the article: number of the class}.

    Raises:
      ValueError: a label is malformed, or the file is cut short.
    """
    labels = {}
    for number, element in _articles(path):
        label = element.get("hyperpartisan")
        if label not in CLASSES:
            place = f"{path}, article {number:07}, hyperpartisan"
            raise ValueError(f"{place}: expected 'true' or 'false', found {label!r}")
        labels[number] = CLASSES.index(label)
    return labels


def plain(string: str) -> str:
    """Removes HTML tags, which some articles have escaped twice, and merges white space.

    Args:
      string: the text.

    Returns:
      The words of the text, with one space between them.
    """
    return " ".join(re.sub(r"</?[a-zA-Z][^<>]*>", " ", html.unescape(string)).split())


def _articles(path: Path) -> Iterator[tuple[int, ElementTree.Element]]:
    """Yields (id, element) of each article, and reads one at a time."""
    seen: set[int] = set()
    root: ElementTree.Element | None = None
    for event, element in watch(_elements(path), f"reading {path}", "elements"):
        root = element if root is None else root
        if event == "end" and element.tag == "article":
            name = element.get("id", "")
            if not name.isdecimal() or len(name) > _DIGITS or int(name) in seen:
                place = f"{path}, article {len(seen) + 1}"
                raise ValueError(f"{place}, id: expected a unique number, found {name[:60]!r}")
            seen.add(int(name))
            yield int(name), element
            root.clear()


def _elements(path: Path) -> Iterator[tuple[str, ElementTree.Element]]:
    """Yields the starts and ends of a file's elements."""
    try:
        yield from ElementTree.iterparse(path, ("start", "end"))
    except ElementTree.ParseError as error:
        line = error.position[0]
        cause = f"cut short, or not XML ({error})"
        raise ValueError(f"{path}, line {line}: {cause}; fetch the file again") from error
    except (LookupError, ValueError) as error:  # an encoding unknown to Python or the XML parser
        cause = f"the XML is in an encoding that is not read ({error})"
        raise ValueError(f"{path}: {cause}: save the file as UTF-8") from error
