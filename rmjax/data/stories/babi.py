"""bAbI v1.2 (Weston et al. 2015): 20 tasks of short stories in a small language.

A story is one example. Its questions are asked along the story, and are not part of the stream. An
answer is one class as written, even if it is a list ('milk,football'). Words and answers are
collected from all three splits, as in published work: the language is closed. They are also
collected from all tasks that have files. Thus a run on some tasks can start from a run on others.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from absl import logging
from ml_collections import ConfigDict

from rmjax.data import records
from rmjax.data.shares import log_source
from rmjax.data.source import Source
from rmjax.data.stories.text import Story, TextBuilder, TextRecords, sentences_of, tokenize
from rmjax.io import paths, text
from rmjax.registry import at_least, one_of, setting

TASKS = 20
MOST_BYTES = 1 << 26  # of a task's file; the largest of the release has 2.5 MB
ADVICE = (
    "The release is tasks_1-20_v1-2.tar.gz of https://research.facebook.com/downloads/babi; set "
    "data.dir to it, or to the folder it unpacks to."
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The tasks, and how their stories are written."""

    asks_in_words: ClassVar[bool] = True
    subset: str = setting("en-10k", one_of("en", "en-10k"), "1,000 or 10,000 questions a task")
    tasks: str = setting("", doc="numbers of the tasks, such as '1,2,15'; empty: all 20")
    per_question: bool = setting(False, doc="writes a story anew for each of its questions")
    max_sentences: int = setting(0, at_least(0), "last sentences kept of a story; 0: all")

    def sentences(self, story: str | Sequence[str], segment_length: int) -> list[list[str]]:
        """The words that a model reads of a story, see `registry.Sources`."""
        return sentences_of(story)[-self.max_sentences :]


def make(settings: Settings, common: ConfigDict, seed: int) -> Source:
    """Builds the source, see `open_babi`."""
    return open_babi(
        common.dir,
        common.cache_dir,
        segment_length=common.segment_length,
        buckets=common.buckets,
        **vars(settings),
    )


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
    """Opens the source; the first call prepares the data.

    The splits are the release's own ('en-valid', 'en-valid-10k'). If the release has none for a
    task, 'valid' is the last tenth of the training stories. If the training file of a task is
    missing, a file named ..._train.PARTIAL-... takes its place. The metadata tell which: 'splits'
    {task: where its splits come from}, 'partial' {task: questions in the partial file}, 'missing'
    {task: a file that is missing}. The groups are the tasks, 'qa1' to 'qa20'.

    Args:
      directory: the release's folder, the folder above it, or the archive (.tar.gz, .tar.xz, .tar).
      cache_dir: folder for prepared data, see `records.prepare`.
      segment_length: most words of a segment.
      subset: 'en' (1,000 training questions a task) or 'en-10k'.
      tasks: numbers of the tasks, such as '1,2,15'; '' is all 20.
      per_question: as in `TextRecords`.
      max_sentences: as in `TextRecords`.
      buckets: as in `TextRecords`.

    Returns:
      The source.

    Raises:
      FileNotFoundError: the release is missing, or a file of a chosen task.
      ValueError: `tasks` are not numbers from 1 to 20; a line of any task is malformed; a file ends
        within a story; the archive is damaged, or holds links or too large files in the place of
        tasks.
    """
    chosen = _task_names(tasks)
    folders = (subset, re.sub("(-10k)?$", r"-valid\1", subset, count=1))
    files = _find_files(directory, folders)
    parameters = dict(folders=folders)
    stored = records.prepare(BabiBuilder, cache_dir, files=files, parameters=parameters)
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
            note = "bAbI %s: the training file is only a part of the release's, with %d questions."
            logging.warning(note, task, questions)
    log_source("bAbI", source, "questions" if per_question else "stories")
    return source


def _task_names(tasks: str) -> list[str]:
    """The tasks that a setting such as '1,2,15' names: ['qa1', 'qa2', 'qa15']."""
    numbers = range(1, TASKS + 1)
    asked = [task.strip() for task in tasks.split(",")] if tasks else map(str, numbers)
    chosen = {int(task) if re.fullmatch("[0-9]{1,9}", task) else 0 for task in asked}
    if not chosen <= set(numbers):
        expected = f"expected numbers from 1 to {TASKS}, separated by commas, or nothing"
        raise ValueError(f"config.data.babi.tasks={tasks!r}: {expected}")
    return [f"qa{task}" for task in sorted(chosen)]


def _find_files(directory: str, folders: tuple[str, str]) -> tuple[Path, ...]:
    """The archive, or the files of all tasks in `folders`."""
    path = paths.resolve(directory, "config.data.dir")
    files: list[Path] = [path] if directory and path.is_file() else []
    for root in (path, path / "tasks_1-20_v1-2"):
        if directory and not files:
            files = [file for folder in folders for file in paths.visible(root / folder, "qa*.txt")]
    if not files:
        place = paths.lacks(directory, f"{folders[0]}/qa*.txt")
        raise FileNotFoundError(f"{folders[0]}/qa1_..._train.txt not found in {place}. {ADVICE}")
    return tuple(files)


class BabiBuilder(TextBuilder):
    """Stores the stories of each task, task after task, in the order of the files."""

    name = "babi"
    fields = (*TextBuilder.fields, "group")
    counted = ("train", "valid", "test")

    def stories(self) -> dict[str, list[Story]]:
        """See `TextBuilder.stories`."""
        folders = self.builder_config.parameters["folders"]
        texts = read_files(self.builder_config.files, folders)
        classes: dict[str, int] = {}
        splits: dict[str, list[Story]] = {"train": [], "valid": [], "test": []}
        chosen, partial, missing = {}, {}, {}
        for task in range(1, TASKS + 1):
            try:
                files, chosen[f"qa{task}"] = task_files(texts, folders, task)
            except FileNotFoundError as error:
                missing[f"qa{task}"] = str(error)  # the name of the file, without its folder
                continue
            group = len(chosen) - 1
            parts = {split: parse(*texts[name], group, classes) for split, name in files.items()}
            if "PARTIAL" in files["train"]:
                partial[f"qa{task}"] = sum(len(story.target) for story in parts["train"])
            if "valid" not in parts:
                kept = len(parts["train"]) - max(1, round(len(parts["train"]) / 10))
                if not kept:
                    path = texts[files["train"]][0]
                    raise records.malformed(path, 1, "story", "two stories or more", "one")
                parts["train"], parts["valid"] = parts["train"][:kept], parts["train"][kept:]
            for split, stories in parts.items():
                splits[split] += stories
        if not chosen:
            raise not_found(missing["qa1"], next(iter(texts.values()))[0], ", nor a whole task")
        self.info.metadata.update(classes=list(classes), groups=list(chosen))
        self.info.metadata.update(splits=chosen, partial=partial, missing=missing)
        return splits


def read_files(files: tuple[Path, ...], folders: tuple[str, ...]) -> dict[str, tuple[Path, str]]:
    """Reads the files of all tasks.

    Args:
      files: the text files, or one archive.
      folders: the folders of an archive whose files are read.

    Returns:
      {'en-10k/qa1_single-supporting-fact_train.txt': (path of the file, text of the file)}.

    Raises:
      FileNotFoundError: the archive has no file of a task.
      ValueError: the archive is damaged, or a member is a link, a device or too large.
    """
    if files[0].suffix == ".txt":
        return {f"{file.parent.name}/{file.name}": (file, text.read_text(file)) for file in files}
    wanted = re.compile(rf"(?:.*/)?((?:{'|'.join(map(re.escape, folders))})/qa[^/]*\.txt)")
    texts = {}
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
) -> Iterator[tuple[re.Match[str], tarfile.TarInfo, bytes | None]]:
    """(match, member, content) of an archive's members with a wanted name.

    The content is None if the member is not a file, or is too large.

    Raises:
      ValueError: the archive is damaged.
    """
    try:
        with tarfile.open(path, tarinfo=_Member) as archive:
            for member in archive:
                match = wanted.fullmatch(member.name)
                if match and not member.isdir():
                    readable = member.isreg() and member.size <= MOST_BYTES
                    file = archive.extractfile(member) if readable else None
                    yield match, member, file.read() if file else None
            while archive.fileobj and archive.fileobj.read(1 << 20):  # the checksum is at the end
                pass
    except Exception as error:  # what tarfile raises on a damaged header is not documented
        cause = str(error).partition(":")[0]  # tarfile appends one line per method it has tried
        message = f"{path}: the archive is damaged or cut short ({cause}); fetch it again. {ADVICE}"
        raise ValueError(message) from error


class _Member(tarfile.TarInfo):
    """A member of an archive, whose headers have a bounded size.

    tarfile reads the long name of a member, and other notes on it, into memory in one piece.
    """

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        member = super().frombuf(buf, encoding, errors)
        if member.size > 1 << 20 and not member.isreg():
            raise tarfile.ReadError(f"a header of {member.size:,} bytes")
        return member


def not_found(name: str, beside: Path, more: str) -> FileNotFoundError:
    """Makes the error of a missing file.

    Args:
      name: the missing file, with its folder in the release.
      beside: a file of the release, or the archive.
      more: continues the sentence.

    Returns:
      The error, which says where the release comes from.
    """
    where = beside.parent.parent if beside.suffix == ".txt" else beside
    return FileNotFoundError(f"{name} not found in {where}{more}. {ADVICE}")


def task_files(
    texts: dict[str, tuple[Path, str]], folders: tuple[str, ...], task: int
) -> tuple[dict[str, str], str]:
    """Chooses the files of a task.

    Args:
      texts: see `read_files`.
      folders: (subset, folder of the same subset with official splits).
      task: 1 to 20.

    Returns:
      ({split: name of the file}, where the splits come from). There is no file of 'valid' if the
      release has none.

    Raises:
      FileNotFoundError: a file is missing; the message is the name of the file.
    """
    subset, valid = folders
    files = {split: f"{valid}/qa{task}_{split}.txt" for split in ("train", "valid", "test")}
    if all(name in texts for name in files.values()):
        return files, valid
    files = {}
    for split, endings in {"train": (r"\.txt", r"\.PARTIAL-.*\.txt"), "test": (r"\.txt",)}.items():
        start = rf"{re.escape(subset)}/qa{task}_.*_{split}"
        patterns = [re.compile(start + ending) for ending in endings]
        names = [name for pattern in patterns for name in texts if pattern.fullmatch(name)]
        if not names:
            raise FileNotFoundError(f"{subset}/qa{task}_..._{split}.txt")
        files[split] = names[0]
    return files, f"{subset}, the last tenth of its training stories as valid"


def parse(path: Path, content: str, group: int, classes: dict[str, int]) -> list[Story]:
    """Parses the stories of a file.

    Args:
      path: the file, for messages.
      content: the text of the file.
      group: index of the task among the groups.
      classes: {answer: number}; new answers are added.

    Returns:
      The stories.

    Raises:
      ValueError: a line is malformed, or the last story ends without a question, as in a file that
        was cut short; names the line and field.
    """
    words = functools.cache(tokenize)  # lines recur
    wrong = functools.partial(records.malformed, path)
    stories: list[Story] = []
    begins, last = [], 0  # lines at which stories begin; the ID of the previous line
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
            raise wrong(number, "answer", "a word, or several separated by commas", answer)
        if not _are_facts(rest[1:], last):
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
        expected = "a question at its end (the file may be cut short: fetch it again)"
        raise wrong(len(lines), "story", expected, lines[-1])
    return [story._replace(group=[group] * len(story.questions)) for story in stories]


def _are_facts(columns: list[str], last: int) -> bool:
    """Whether the columns after an answer are one list of IDs of earlier lines."""
    facts = columns[0].split() if len(columns) == 1 else []
    return bool(facts) and all(
        re.fullmatch("[0-9]{1,9}", fact) and 0 < int(fact) < last for fact in facts
    )
