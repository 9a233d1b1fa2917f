"""Tokenizers from text to ids and back: bytes, characters, words, or a tokenizer.json."""

from __future__ import annotations

import functools
import hashlib
import json
import re
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
_NO_BYTE = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # lone surrogates that stand for no byte
# There are at most SPARSE ids for each token, or MOST ids in all if that is more.
SPARSE = 16
MOST = 1 << 16


class Tokenizer(Protocol):
    """Converts text to ids and back.

    Bytes that are not UTF-8 are lone surrogates in a text (errors="surrogateescape").
    """

    size: int
    """Ids are 0 .. size - 1."""
    vocabulary: list[str]
    """The token of each id; all are different."""
    lossless: bool
    """Whether the tokens hold the complete text. Losses by word and by character are then exact."""
    state: dict[str, Any]
    """What is stored with the data, as JSON; equal if two tokenizers make the same ids."""

    def encode(self, string: str) -> np.ndarray:
        """Converts a text to ids.

        Args:
          string: the text.

        Returns:
          unsigned [tokens], without special tokens at the ends.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Converts ids back to text.

        Args:
          ids: the ids.

        Returns:
          The text; 'words' loses punctuation and upper case.
        """

    def unknown(self, string: str) -> list[str]:
        """Lists the characters or words of a text that have no token of their own.

        Args:
          string: the text.

        Returns:
          The different ones in order; `encode` makes the same unknown token of all.
        """


def make_tokenizer(
    name: str, training_texts: Iterable[str] | None = None, min_count: int = 1
) -> Tokenizer:
    """Makes a tokenizer.

    Args:
      name: 'bytes' (256 ids), 'characters', 'words' (as `rmjax.data.stories.text.tokenize`), or the
        path of a tokenizer.json or of the folder with that file.
      training_texts: the texts whose characters or words become the vocabulary; read once.
      min_count: characters and words that occur less often in the training texts have id 0.

    Returns:
      The tokenizer.

    Raises:
      FileNotFoundError: `name` is none of these.
      ValueError: 'characters' or 'words' get no training texts; or the file is not a
        tokenizer.json, or has ids far above the number of tokens.
      ModuleNotFoundError: `tokenizers`, which reads a tokenizer.json, is not installed.
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
            f"tokenizer={name!r}: the training texts, which give the vocabulary, are empty"
        )
    return restore(name, dict(kind=name, vocabulary=text.make_vocabulary(counts, min_count)))


def restore(name: str, state: dict[str, Any]) -> Tokenizer:
    """Makes the tokenizer of a stored state.

    Args:
      name: as in `make_tokenizer`.
      state: the attribute `state` of the tokenizer.

    Returns:
      An equal tokenizer.

    Raises:
      FileNotFoundError, ValueError, ModuleNotFoundError: as `make_tokenizer`.
    """
    if "vocabulary" not in state:
        return make_tokenizer(name)
    return (Words if name == "words" else Characters)(state["vocabulary"])


def packed(tokenizer: Tokenizer) -> dict[str, Any]:
    """Packs a tokenizer so that `unpacked` needs no file.

    Args:
      tokenizer: the tokenizer.

    Returns:
      What `unpacked` needs beside the vocabulary, as JSON.
    """
    state = {key: value for key, value in tokenizer.state.items() if key != "vocabulary"}
    return state | {"json": tokenizer.json} if isinstance(tokenizer, FromFile) else state


def unpacked(state: dict[str, Any], vocabulary: Iterable[str]) -> Tokenizer:
    """Makes a packed tokenizer again.

    Args:
      state: what `packed` returned.
      vocabulary: the token of each id.

    Returns:
      An equal tokenizer.

    Raises:
      ModuleNotFoundError: `tokenizers`, which reads a tokenizer.json, is not installed.
    """
    if "json" in state:
        return FromFile("the tokenizer.json that a run kept", state["json"])
    kind = state["kind"]
    return restore(kind, {} if kind == "bytes" else {"vocabulary": list(vocabulary)})


def identity(name: str) -> str:
    """Identifies a tokenizer by content.

    Args:
      name: as in `make_tokenizer`.

    Returns:
      A text that is equal for two names if both make the same ids from the same training texts.

    Raises:
      FileNotFoundError: `name` is not a tokenizer.
    """
    return name if name in KINDS else _digest(name)


class Bytes:
    """The bytes of UTF-8; an id is the value of a byte."""

    lossless = True

    def __init__(self) -> None:
        self.size, self.state = 256, dict(kind="bytes")
        self.vocabulary = [f"<0x{i:02X}>" for i in range(256)]

    def encode(self, string: str) -> np.ndarray:
        """See `Tokenizer.encode`."""
        return np.frombuffer(string.encode("utf-8", "surrogateescape"), np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return bytes(map(int, ids)).decode("utf-8", "replace")

    def unknown(self, string: str) -> list[str]:
        """See `Tokenizer.unknown`; bytes make up every text."""
        return []


class Characters:
    """Code points. Id 0 stands for all that are not in the vocabulary.

    Args:
      vocabulary: the character of each id.
    """

    lossless = True  # except for characters that the training texts lack

    def __init__(self, vocabulary: list[str]):
        self.vocabulary, self.size = vocabulary, len(vocabulary)
        self.state = dict(kind="characters", vocabulary=vocabulary)
        self._ids = np.zeros(0x110000, np.uint32)
        self._ids[[ord(character) for character in vocabulary[1:]]] = np.arange(1, self.size)

    def encode(self, string: str) -> np.ndarray:
        """See `Tokenizer.encode`."""
        return self._ids[np.frombuffer(string.encode("utf-32-le", "surrogatepass"), "<u4")]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return "".join(self.vocabulary[int(i)] for i in ids)

    def unknown(self, string: str) -> list[str]:
        """See `Tokenizer.unknown`."""
        return [character for character in dict.fromkeys(string) if not self._ids[ord(character)]]


class Words:
    """The words of `rmjax.data.stories.text.tokenize`. Id 0 stands for all others.

    Args:
      vocabulary: the word of each id.
    """

    lossless = False

    def __init__(self, vocabulary: list[str]):
        self.vocabulary, self.size = vocabulary, len(vocabulary)
        self.state = dict(kind="words", vocabulary=vocabulary)
        self._ids = {word: i for i, word in enumerate(vocabulary)}

    def encode(self, string: str) -> np.ndarray:
        """See `Tokenizer.encode`."""
        return np.array([self._ids.get(word, 0) for word in text.tokenize(string)], np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return " ".join(self.vocabulary[int(i)] for i in ids)

    def unknown(self, string: str) -> list[str]:
        """See `Tokenizer.unknown`."""
        return [word for word in dict.fromkeys(text.tokenize(string)) if not self._ids.get(word)]


class FromFile:
    """A tokenizer.json of the `tokenizers` library.

    Settings of the file for truncation, padding and special tokens at the ends are ignored. The
    tokenizer counts as lossless if it returns a text of odd spaces, letters and words unchanged.
    The training texts of the tokenizer may lack some of these.

    Args:
      name: the path of the file or folder; for errors only if `content` is given.
      content: the content of the file; None: the file is read.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the content is not a valid tokenizer.json.
      ModuleNotFoundError: the library is not installed.
    """

    def __init__(self, name: str, content: str | None = None):
        if content is None:
            self.state = dict(kind="file", sha256=_digest(name))
            self._file: Path | str = _file(name)
        else:
            self.state = dict(kind="file")
            self._file = name
        try:
            import tokenizers
        except ModuleNotFoundError as error:
            cause = "the library tokenizers, which reads it, is not installed"
            raise ModuleNotFoundError(f"{name}: {cause}: pip install 'rmjax[text]'") from error
        try:
            make = tokenizers.Tokenizer
            file = str(self._file)
            self._tokenizer = make.from_file(file) if content is None else make.from_str(content)
        except Exception as error:  # the library raises no narrower error
            cure = "save one with Tokenizer.save; if your library is older than the file, "
            cure += "pip install -U tokenizers"
            raise ValueError(f"{self._file}: not a tokenizer.json ({error}); {cure}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab()
        self.size = max(ids.values(), default=-1) + 1
        if not self.size:
            raise ValueError(f"{self._file}: the vocabulary is empty; fetch the file again")
        if self.size > max(SPARSE * len(ids), MOST):  # a list of all ids would fill the memory
            token = max(ids, key=ids.__getitem__)
            raise ValueError(
                f"{self._file}: the token {token!r} has the id {ids[token]}, of {len(ids)} tokens: "
                "ids must count up from 0 with few gaps. Is the file damaged? Fetch it again"
            )
        if content is None:
            self._check(ids, read_json(_file(name)).get("added_tokens") or ())
        self.vocabulary = [f"<no token {i}>" for i in range(self.size)]
        for token, i in ids.items():
            self.vocabulary[i] = token
        try:
            # Some tokenizers put a space first.
            self.lossless = self.decode(self.encode(ODD)) in (ODD, f" {ODD}")
        except Exception:  # no token for an unknown word; the library raises no narrower error
            self.lossless = False

    @property
    def json(self) -> str:
        """The content of a tokenizer.json with this tokenizer."""
        return self._tokenizer.to_str()

    def _check(self, ids: Mapping[str, int], added: Sequence[Mapping[str, Any]]) -> None:
        """Raises ValueError if two tokens share an id, or an id differs from that in the file."""
        stated = {token["content"]: token["id"] for token in added}
        seen: dict[int, str] = {}
        for token, i in ids.items():
            of_file = stated.get(token, i)
            if i in seen or of_file != i:
                wrong = (
                    f"the id {i} of {seen[i]!r}" if i in seen else f"the id {of_file}, and gets {i}"
                )
                cure = "Is the file damaged? Fetch it again"
                raise ValueError(f"{self._file}: the token {token!r} has {wrong}. {cure}")
            seen[i] = token

    def encode(self, string: str) -> np.ndarray:
        """See `Tokenizer.encode`."""
        try:
            return np.array(
                self._tokenizer.encode(_valid(string), add_special_tokens=False).ids, np.uint32
            )
        except Exception as error:  # the library raises no narrower error
            cause = f"a text cannot be tokenized ({error})"
            cure = "take a tokenizer that has a token for every text"
            raise ValueError(f"{self._file}: {cause}; {cure}") from error

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def unknown(self, string: str) -> list[str]:
        """See `Tokenizer.unknown`; a tokenizer without an unknown token knows every text."""
        if self._unknown_id is None:
            return []
        string = _valid(string)
        encoded = self._tokenizer.encode(string, add_special_tokens=False)
        pairs = zip(encoded.ids, encoded.offsets, strict=True)
        return list(
            dict.fromkeys(string[slice(*place)] for i, place in pairs if i == self._unknown_id)
        )

    @functools.cached_property
    def _unknown_id(self) -> int | None:
        """The id of the unknown token. Unigram models name its number in the vocabulary only."""
        token = getattr(self._tokenizer.model, "unk_token", None)
        if token is None:
            return json.loads(self.json)["model"].get("unk_id")
        return self._tokenizer.token_to_id(token)


def _valid(string: str) -> str:
    """The text with U+FFFD for lone surrogates, which the library refuses."""
    encodable = _NO_BYTE.sub("\ufffd", string)
    return encodable.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _file(name: str) -> Path:
    """Finds the tokenizer.json that a path names."""
    path = paths.resolve(name, "tokenizer")
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer={name!r}: {EXPECTED}; there is no file {path}")
    return path


def _digest(name: str) -> str:
    """Digests the content of a tokenizer.json."""
    return hashlib.sha256(_file(name).read_bytes()).hexdigest()
