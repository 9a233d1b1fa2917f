"""From text to token ids and back: bytes, characters, words, or what a tokenizer.json says."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rmjax.data.stories import text
from rmjax.io import paths
from rmjax.io.text import read_json

KINDS = ("bytes", "characters", "words")
ODD = " \n\nThe  Cat\n\nsat,\tzyzzyva-like: «Ünïcode» ﬁ½ 中文 ☃.\n "
EXPECTED = (
    f"expected {', '.join(map(repr, KINDS))}, or the path of a tokenizer.json, or of its folder"
)
SPARSE = 16  # ids stay below so many times the number of tokens, or below MOST
MOST = 1 << 16


class Tokenizer(Protocol):
    """Text to ids and back. Bytes that are not UTF-8 are lone surrogates in a text (errors="surrogateescape")."""

    size: int
    """Ids are 0 .. size - 1."""
    vocabulary: list[str]
    """The token of each id, no two the same."""
    lossless: bool
    """Whether all of a text is in its tokens, so that a loss is one of its words and characters too."""
    state: dict[str, Any]
    """What is kept beside the data, as JSON: equal where two tokenizers make the same ids."""

    def encode(self, string: str) -> np.ndarray:
        """Unsigned [tokens]. Nothing is added at the ends."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text; of 'words' without its punctuation and in lower case."""


def make_tokenizer(
    name: str, training_texts: Iterable[str] | None = None, min_count: int = 1
) -> Tokenizer:
    """'bytes' (256 ids), 'characters' and 'words' (as `rmjax.data.stories.text` has them), or the path of a
    tokenizer.json or of its folder.

    Of characters and words id 0 is what `training_texts`, read once, have less than `min_count` times.

    Raises:
      FileNotFoundError: `name` is none of these.
      ValueError: there are no training texts and 'characters' or 'words' need them; the file is no
        tokenizer.json, or its ids go far beyond the number of its tokens.
      ModuleNotFoundError: a tokenizer.json is asked for and `tokenizers` is not installed.
    """
    if name == "bytes":
        return Bytes()
    if name not in KINDS:
        return FromFile(name)
    split = text.tokenize if name == "words" else str
    counts: Counter[str] = Counter()
    for string in training_texts or ():
        counts.update(split(string))
    if not counts:
        raise ValueError(
            f"tokenizer={name!r}: its vocabulary is that of the training texts, and they are empty"
        )
    return restore(name, dict(kind=name, vocabulary=text.make_vocabulary(counts, min_count)))


def restore(name: str, state: dict[str, Any]) -> Tokenizer:
    """The tokenizer `name` whose `state` this is."""
    if "vocabulary" not in state:
        return make_tokenizer(name)
    return (Words if name == "words" else Characters)(state["vocabulary"])


def packed(tokenizer: Tokenizer) -> dict[str, Any]:
    """All that `unpacked` needs beside the vocabulary to make the tokenizer again, without a file; as JSON."""
    state = {key: value for key, value in tokenizer.state.items() if key != "vocabulary"}
    return state | {"json": tokenizer.json} if isinstance(tokenizer, FromFile) else state


def unpacked(state: dict[str, Any], vocabulary: Iterable[str]) -> Tokenizer:
    """The tokenizer that was `packed`.

    Args:
      state: what `packed` gave.
      vocabulary: the token of each id.

    Raises:
      ModuleNotFoundError: it is a tokenizer.json, and `tokenizers` is not installed.
    """
    if "json" in state:
        return FromFile("the tokenizer.json that a run kept", state["json"])
    return restore(
        state["kind"], {} if state["kind"] == "bytes" else {"vocabulary": list(vocabulary)}
    )


def identity(name: str) -> str:
    """Equal for two names where they make the same ids of the same training texts; FileNotFoundError if for none."""
    return name if name in KINDS else _digest(name)


class Bytes:
    """UTF-8."""

    lossless = True

    def __init__(self) -> None:
        self.size, self.state = 256, dict(kind="bytes")
        self.vocabulary = [f"<0x{i:02X}>" for i in range(256)]

    def encode(self, string: str) -> np.ndarray:
        return np.frombuffer(string.encode("utf-8", "surrogateescape"), np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(map(int, ids)).decode("utf-8", "replace")


class Characters:
    """Code points by a vocabulary whose id 0 is all others."""

    lossless = True  # but for characters that the training texts have not

    def __init__(self, vocabulary: list[str]):
        self.vocabulary, self.size = vocabulary, len(vocabulary)
        self.state = dict(kind="characters", vocabulary=vocabulary)
        self._ids = np.zeros(0x110000, np.uint32)
        self._ids[[ord(character) for character in vocabulary[1:]]] = np.arange(1, self.size)

    def encode(self, string: str) -> np.ndarray:
        return self._ids[np.frombuffer(string.encode("utf-32-le", "surrogatepass"), "<u4")]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.vocabulary[int(i)] for i in ids)


class Words:
    """`text.tokenize` by a vocabulary whose id 0 is all others."""

    lossless = False

    def __init__(self, vocabulary: list[str]):
        self.vocabulary, self.size = vocabulary, len(vocabulary)
        self.state = dict(kind="words", vocabulary=vocabulary)
        self._ids = {word: i for i, word in enumerate(vocabulary)}

    def encode(self, string: str) -> np.ndarray:
        return np.array([self._ids.get(word, 0) for word in text.tokenize(string)], np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self.vocabulary[int(i)] for i in ids)


class FromFile:
    """A tokenizer.json of the `tokenizers` library; what it says of truncation, padding and special tokens at the ends
    is left out. It is lossless if it gives back a text of odd spaces, letters and words, some of which those that it
    was trained on may not have had.
    """

    def __init__(self, name: str, content: str | None = None):
        """content: of the file, which is not read then; `name` is for errors."""
        if content is None:
            self.state = dict(kind="file", sha256=_digest(name))
            self._file: Path | str = _file(name)
        else:
            self.state = dict(kind="file")
            self._file = name
        try:
            import tokenizers
        except ModuleNotFoundError as error:
            message = (
                f"{name}: tokenizers, which reads it, is not installed: pip install 'rmjax[text]'"
            )
            raise ModuleNotFoundError(message) from error
        try:
            make = tokenizers.Tokenizer
            self._tokenizer = (
                make.from_file(str(self._file)) if content is None else make.from_str(content)
            )
        except Exception as error:  # the library raises no narrower one
            cure = "save one with Tokenizer.save, or pip install -U tokenizers where yours is older than the file"
            raise ValueError(f"{self._file}: not a tokenizer.json ({error}); {cure}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab()
        self.size = max(ids.values(), default=-1) + 1
        if not self.size:
            raise ValueError(f"{self._file}: its vocabulary is empty")
        if self.size > max(SPARSE * len(ids), MOST):  # a list of all would fill the memory
            token = max(ids, key=ids.__getitem__)
            raise ValueError(
                f"{self._file}: its token {token!r} has the id {ids[token]}, of {len(ids)} tokens in all: ids "
                "must run from 0 on with few gaps. Is the file damaged? Fetch it again"
            )
        if content is None:
            self._check(ids, read_json(_file(name)).get("added_tokens") or ())
        self.vocabulary = [f"<no token {i}>" for i in range(self.size)]
        for token, i in ids.items():
            self.vocabulary[i] = token
        try:
            self.lossless = self.decode(self.encode(ODD)) in (
                ODD,
                f" {ODD}",
            )  # some put a space first
        except Exception:  # no narrower one here either: it has no token for what it does not know
            self.lossless = False

    @property
    def json(self) -> str:
        """What a tokenizer.json of it has in it."""
        return self._tokenizer.to_str()

    def _check(self, ids: dict[str, int], added: Sequence[Mapping[str, Any]]) -> None:
        """Raises ValueError where two tokens have one id, or a token has another id than the file says."""
        stated = {token["content"]: token["id"] for token in added}
        seen: dict[int, str] = {}
        for token, i in ids.items():
            wrong = (
                f"the id {i} of {seen[i]!r}"
                if i in seen
                else f"the id {stated.get(token, i)}, and gets {i}"
            )
            if i in seen or stated.get(token, i) != i:
                raise ValueError(
                    f"{self._file}: its token {token!r} has {wrong}. Is the file damaged? Fetch it again"
                )
            seen[i] = token

    def encode(self, string: str) -> np.ndarray:
        valid = string.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        try:
            return np.array(self._tokenizer.encode(valid, add_special_tokens=False).ids, np.uint32)
        except Exception as error:  # the library raises no narrower one
            cause = f"a text cannot be made tokens ({error})"
            raise ValueError(
                f"{self._file}: {cause}; take one that has a token for every text"
            ) from error

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def _file(name: str) -> Path:
    path = paths.resolve(name, "tokenizer")
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer={name!r}: {EXPECTED}; there is no file {path}")
    return path


def _digest(name: str) -> str:
    return hashlib.sha256(_file(name).read_bytes()).hexdigest()
