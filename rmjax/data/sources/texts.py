"""WikiText, PG-19, enwik8 and any books, see `rmjax.data.texts.documents` and `rmjax.data.texts.streams`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from rmjax.registry import a_path, at_least, between, inside, setting

if TYPE_CHECKING:
    from rmjax.data.texts.streams import Texts


@dataclasses.dataclass(frozen=True)
class Settings:
    """How texts become tokens, and where memories begin anew."""

    section: ClassVar[str] = "text"
    task: ClassVar[str] = "every token"

    tokenizer: str = setting("bytes", a_path, "texts: bytes, characters, words, or a tokenizer.json")
    train_share: float = setting(0.07, between(1e-6, 1), "pg19: share of the training books that is read")
    held_out: float = setting(0.1, inside(0, 0.5), "books: share of them to validate on, and as many to test on")
    aligned: bool = setting(True, doc="documents are cut to whole segments; the rest of each is dropped")
    reset_documents: bool = setting(False, doc="memories begin anew with every document; needs aligned")
    reset_segments: int = setting(0, at_least(0), "training: memories begin anew after so many segments; 0: never")
    reset_evaluation: bool = setting(False, doc="and in evaluation too")
    skip_first: bool = setting(False, doc="the first token of a segment is not predicted")


def make(settings: Settings, common: Any, seed: int) -> Texts:
    from rmjax.data.texts.documents import documents
    from rmjax.data.texts.streams import Texts

    options = dict(vars(settings))
    shares = {name: options.pop(name) for name in ("train_share", "held_out")}
    splits = documents(common.name, common.dir, common.cache_dir, options.pop("tokenizer"), **shares)
    return Texts(splits, common.segment_length, common.segments, **options)
