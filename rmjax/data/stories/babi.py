"""bAbI v1.2 (Weston et al. 2015): 20 tasks of short stories in a small language, questions asked along each story.

A story is one example, asked at every question's place; the questions themselves are not part of the stream. A whole
answer is one class, a list ('milk,football') too. Words and answers are those of all three splits, as in published
work (the language is closed), and of all tasks that have files, so that a run on some of them may begin from a run on
others.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging

from rmjax.data import records
from rmjax.data.source import Source
from rmjax.data.stories.text import Story, TextBuilder, TextRecords, tokenize
from rmjax.io import paths, text
from rmjax.registry import at_least, one_of, setting

TASKS = 20
MOST_BYTES = 1 << 26  # of a task's file; the largest of the release has 2.5 MB
ADVICE = (
    "The release is tasks_1-20_v1-2.tar.gz of https://research.facebook.com/downloads/babi; set data.dir to it, or to "
    "the folder it unpacks to."
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which tasks, and how their stories are written."""

    asks_in_words = True
    subset: str = setting("en-10k", one_of("en", "en-10k"), "1,000 or 10,000 questions a task")
    tasks: str = setting("", doc="numbers of the tasks, such as '1,2,15'; empty: all 20")
    per_question: bool = setting(False, doc="writes a story anew for each of its questions")
    max_sentences: int = setting(0, at_least(0), "latest sentences kept of a story; 0: all")


def make(settings: Settings, common: Any, seed: int) -> Source:
    options = dict(segment_length=common.segment_length, buckets=common.buckets)
    return open_babi(common.dir, common.cache_dir, **options, **vars(settings))


def open_babi(
    directory: str,
    cache_dir: str,
    *,
    segment_length: int = 15,
    subset: str = "en-10k",
    tasks: str = "",
    per_question: bool = False,
    max_sentences: int = 0,
    buckets: int = 6,
) -> TextRecords:
    """The source. `directory` is the release's folder, the one above it or the archive (.tar.gz, .tar.xz, .tar).

    `tasks` are numbers ('1,2,15'; '' is all 20), `subset` 'en' (1,000 questions to train on) or 'en-10k'. The splits
    are the release's own ('en-valid', 'en-valid-10k'); of a task that is not there, 'valid' is the last tenth of the
    training stories. Of a task whose training file is missing, one named ..._train.PARTIAL-... is taken.
    `metadata['splits']` says which each task has, `metadata['partial']` {task: questions} which are in part, and
    `metadata['missing']` which have no files.
    `per_question`, `max_sentences` and `buckets` are as in `TextRecords`; groups are the tasks, 'qa1' to 'qa20'.

    Raises:
      FileNotFoundError: there is no release, or a task has no file.
      ValueError: a malformed line of any task, a file that ends within a story, an archive that is damaged
        or has links or too large files in the place of tasks, or `tasks` that are not.
    """
    every = range(1, TASKS + 1)
    asked = [task.strip() for task in tasks.split(",")] if tasks else map(str, every)
    numbers = [int(task) if re.fullmatch("[0-9]{1,9}", task) else 0 for task in asked]
    if not set(numbers) <= set(every):
        raise ValueError(
            f"config.data.babi.tasks={tasks!r}: expected numbers from 1 to {TASKS}, with commas between, or nothing"
        )
    folders = (subset, re.sub("(-10k)?$", r"-valid\1", subset, count=1))
    path = paths.resolve(directory, "config.data.dir")
    files: list[Path] = [path] if directory and path.is_file() else []
    for root in (path, path / "tasks_1-20_v1-2"):
        if directory and not files:
            files = [file for folder in folders for file in paths.visible(root / folder, "qa*.txt")]
    if not files:
        raise FileNotFoundError(
            f"{subset}/qa1_..._train.txt not found in {paths.lacks(directory, f'{subset}/qa*.txt')}. {ADVICE}"
        )
    chosen = [f"qa{task}" for task in sorted(set(numbers))]
    stored = records.prepare(
        BabiBuilder, cache_dir, files=tuple(files), parameters=dict(folders=folders)
    )
    for task, name in records.open_records(stored)[0]["missing"].items():
        if task in chosen:
            raise not_found(name, files[0], f"; fetch it or leave {task} out of tasks")
    source = TextRecords(
        stored,
        segment_length=segment_length,
        metric="error",
        positions_at_end=False,
        per_question=per_question,
        max_sentences=max_sentences,
        buckets=buckets,
        groups=chosen,
    )
    for task, questions in source.metadata["partial"].items():
        if task in chosen:
            logging.warning(
                "bAbI %s: only a part of its training file is there, %d questions.", task, questions
            )
    return source


class BabiBuilder(TextBuilder):
    """The stories of each task, in the files' order, task after task."""

    name = "babi"
    fields = (*TextBuilder.fields, "group")
    counted = ("train", "valid", "test")

    def stories(self) -> dict[str, list[Story]]:
        folders = self.builder_config.parameters["folders"]
        texts = read_files(self.builder_config.files, folders)
        classes: dict[str, int] = {}
        splits: dict[str, list[Story]] = {"train": [], "valid": [], "test": []}
        chosen, partial, missing = {}, {}, {}
        for task in range(1, TASKS + 1):
            try:
                files, chosen[f"qa{task}"] = task_files(texts, folders, task)
            except FileNotFoundError as error:
                missing[f"qa{task}"] = str(
                    error
                )  # its file; where that should be is another question
                continue
            parts = {
                split: parse(*texts[name], len(chosen) - 1, classes)
                for split, name in files.items()
            }
            if "PARTIAL" in files["train"]:
                partial[f"qa{task}"] = sum(len(story.target) for story in parts["train"])
            if "valid" not in parts:
                kept = len(parts["train"]) - max(1, round(len(parts["train"]) / 10))
                if not kept:
                    raise records.malformed(
                        texts[files["train"]][0], 1, "story", "two stories or more", "one"
                    )
                parts["train"], parts["valid"] = parts["train"][:kept], parts["train"][kept:]
            for split, stories in parts.items():
                splits[split] += stories
        if not chosen:
            raise not_found(missing["qa1"], next(iter(texts.values()))[0], ", nor a whole task")
        self.info.metadata.update(classes=list(classes), groups=list(chosen))
        self.info.metadata.update(splits=chosen, partial=partial, missing=missing)
        return splits


def read_files(files: tuple[Path, ...], folders: tuple[str, ...]) -> dict[str, tuple[Path, str]]:
    """{'en-10k/qa1_single-supporting-fact_train.txt': (its path, its text)} of an archive, or of the files given."""
    if files[0].suffix == ".txt":
        return {f"{file.parent.name}/{file.name}": (file, text.read_text(file)) for file in files}
    wanted, texts = (
        re.compile(rf"(?:.*/)?((?:{'|'.join(map(re.escape, folders))})/qa[^/]*\.txt)"),
        {},
    )
    for match, member, content in _members(files[0], wanted):
        path = files[0] / member.name
        if content is None and member.isreg():
            most = f"no file of a task has over {MOST_BYTES:,}"
            raise ValueError(f"{path}: {member.size:,} bytes, but {most}. {ADVICE}")
        if content is None:
            raise ValueError(f"{path}: a link or a device: pack the file itself. {ADVICE}")
        texts[match[1]] = (path, text.decode(content, path))
    if not texts:
        raise FileNotFoundError(f"{folders[0]}/qa1_..._train.txt not found in {files[0]}. {ADVICE}")
    return texts


def _members(
    path: Path, wanted: re.Pattern[str]
) -> Iterator[tuple[re.Match, tarfile.TarInfo, bytes | None]]:
    """The members of an archive whose names are wanted. Their bytes are None where they are no file, or too large.

    Raises:
      ValueError: the archive is damaged.
    """
    try:
        with tarfile.open(path, tarinfo=_Member) as archive:
            for member in archive:
                match = wanted.fullmatch(member.name)
                if match and not member.isdir():
                    file = (
                        archive.extractfile(member)
                        if member.isreg() and member.size <= MOST_BYTES
                        else None
                    )
                    yield match, member, file.read() if file else None
            while archive.fileobj and archive.fileobj.read(1 << 20):  # the checksum is at the end
                pass
    except Exception as error:  # what tarfile raises of a damaged header is not listed anywhere
        cause = str(error).partition(":")[
            0
        ]  # tarfile adds what each of its methods says, a line each
        message = f"{path}: the archive is damaged or cut short ({cause}); fetch it again. {ADVICE}"
        raise ValueError(message) from error


class _Member(tarfile.TarInfo):
    """A member of an archive.

    tarfile reads a member's long name, and other notes on it, into memory as a whole: their size is bounded.
    """

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        member = super().frombuf(buf, encoding, errors)
        if member.size > 1 << 20 and not member.isreg():
            raise tarfile.ReadError(f"a header of {member.size:,} bytes")
        return member


def not_found(name: str, beside: Path, more: str) -> FileNotFoundError:
    """beside: a file of the release, in a folder of its own, or its archive."""
    where = beside.parent.parent if beside.suffix == ".txt" else beside
    return FileNotFoundError(f"{name} not found in {where}{more}. {ADVICE}")


def task_files(
    texts: dict[str, tuple[Path, str]], folders: tuple[str, ...], task: int
) -> tuple[dict[str, str], str]:
    """({split: its file}, where they come from) of a task; without a file of 'valid' where the release has none.
    FileNotFoundError is the name of one that is missing.
    """
    subset, valid = folders
    files = {split: f"{valid}/qa{task}_{split}.txt" for split in ("train", "valid", "test")}
    if all(name in texts for name in files.values()):
        return files, valid
    files = {}
    for split, endings in {"train": (r"\.txt", r"\.PARTIAL-.*\.txt"), "test": (r"\.txt",)}.items():
        patterns = [
            re.compile(rf"{re.escape(subset)}/qa{task}_.*_{split}{ending}") for ending in endings
        ]
        found = [name for pattern in patterns for name in texts if pattern.fullmatch(name)]
        if not found:
            raise FileNotFoundError(f"{subset}/qa{task}_..._{split}.txt")
        files[split] = found[0]
    return files, f"{subset}, the last tenth of its training stories as valid"


def parse(path: Path, content: str, group: int, classes: dict[str, int]) -> list[Story]:
    """The stories of a file of this content. New answers are added to `classes`.

    Raises:
      ValueError: a line is not of the format, or the last story ends without a question, as a file that was
        cut short does; names the line and field.
    """
    words = functools.cache(tokenize)  # lines recur
    stories: list[Story] = []
    wrong = functools.partial(records.malformed, path)
    begins, last = [], 0  # lines where stories begin; the ID before this one
    lines = text.split_lines(content, path)
    for number, line in enumerate(lines, 1):
        match = re.fullmatch(r"(\d{1,9}) (.*)", line, re.ASCII)
        if not match:
            raise wrong(number, "ID", "a number, a space and a sentence", line)
        if int(match[1]) not in (1, last + 1 if stories else 1):
            raise wrong(number, "ID", f"1 or {last + 1}" if stories else "1", match[1])
        last = int(match[1])
        if last == 1:
            begins.append(number)
            stories.append(Story([], [], [], []))
        story = stories[-1]
        sentence, *rest = match[2].split("\t")
        if not words(sentence):
            raise wrong(number, "sentence", "words", sentence)
        if not rest and "?" in sentence:
            raise wrong(number, "answer", "a tab and an answer after the question", sentence)
        if not rest:
            story.sentences.append(words(sentence))
            continue
        answer = rest[0].strip()
        if not answer:
            raise wrong(number, "answer", "an answer after the tab", match[2])
        if not words(answer) or re.search(r"\s", answer):
            raise wrong(number, "answer", "a word, or several with commas between", answer)
        facts = rest[1].split() if len(rest) == 2 else []
        if not facts or not all(
            re.fullmatch("[0-9]{1,9}", fact) and 0 < int(fact) < last for fact in facts
        ):
            expected = f"one more tab and numbers from 1 to {last - 1}"
            raise wrong(number, "supporting facts", expected, "\t".join(rest[1:]))
        story.questions.append(words(sentence))
        story.position.append(len(story.sentences))
        story.target.append(classes.setdefault(answer, len(classes)))
    if not stories:
        raise wrong(1, "ID", "a line", "an empty file")
    for number, story in zip(begins, stories, strict=True):
        if not story.questions:
            raise wrong(number, "story", "a question before its end", "none")
    if "\t" not in lines[-1]:
        expected = "a question at its end (fetch a file that was cut short again)"
        raise wrong(len(lines), "story", expected, lines[-1])
    return [story._replace(group=[group] * len(story.questions)) for story in stories]
