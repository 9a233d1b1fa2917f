"""Text from a language model: the memory is carried on, and tokens are drawn one by one.

The text is cut into segments as in training. A full segment updates the state of the model. The
open segment is read again for each new token, from the state before the segment. So every token
has the logits of one pass over the complete text. All shapes are fixed, so two programs are
compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.serve.abilities import Able, require
from rmjax.tasks.sequences import LanguageModel
from rmjax.types import Array, Key, Params, SequenceModel, State

if TYPE_CHECKING:
    from rmjax.data.texts.tokenizers import Tokenizer


class Writer(Able, Protocol):
    """What is needed of a model to write text, see `rmjax.Model`."""

    @property
    def params(self) -> Params:
        """The parameters of the task."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None if the data are no texts."""


def stream(
    model: Writer,
    prompt: str,
    tokens: int = 100,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Continues a text piece by piece, see `Model.generate`.

    Args:
      model: a trained language model.
      prompt: as in `Model.generate`, but one text.
      tokens: as in `Model.generate`.
      temperature: as in `Model.generate`.
      top_p: as in `Model.generate`.
      seed: as in `Model.generate`.

    Yields:
      The next characters. A piece ends with a complete character.

    Raises:
      ValueError: as `Model.generate`.
    """
    tokenizer, (ids,) = _encoded(model, [prompt])
    drawn = draw(model, [ids], tokens, temperature, top_p, seed)
    return decode(tokenizer, ids.tolist(), (int(token) for (token,) in drawn))


def complete(
    model: Writer,
    prompts: Sequence[str],
    tokens: int = 100,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Continues several texts at once, see `Model.generate`.

    Args:
      model: a trained language model.
      prompts: the texts.
      tokens: as in `Model.generate`.
      temperature: as in `Model.generate`.
      top_p: as in `Model.generate`.
      seed: as in `Model.generate`.

    Returns:
      The text after each prompt.

    Raises:
      ValueError: as `Model.generate`.
    """
    tokenizer, rows = _encoded(model, prompts)
    drawn = np.stack(list(draw(model, rows, tokens, temperature, top_p, seed)))
    texts = zip(rows, drawn.T.tolist(), strict=True)
    return ["".join(decode(tokenizer, ids.tolist(), after)) for ids, after in texts]


def draw(
    model: Writer,
    rows: Sequence[np.ndarray],
    tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[np.ndarray]:
    """Draws tokens after the ids of texts.

    Args:
      model: a trained language model.
      rows: B arrays of ids, each with one id or more.
      tokens: number of tokens.
      temperature: as in `Model.generate`.
      top_p: as in `Model.generate`.
      seed: as in `Model.generate`.

    Yields:
      i32 [B], the next token of each text.

    Raises:
      ValueError: as `Model.generate`.
    """
    if tokens < 1:
        raise ValueError(f"tokens = {tokens}: must be at least 1")
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature = {temperature}: must be at least 0; 0: the likeliest token")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p}: must be above 0 and at most 1; 1: all tokens")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed = {seed}: must be from 0 to {2**32 - 1}")
    chosen = float(temperature), float(top_p), seed
    return _draw(_language_model(model), model, rows, tokens, *chosen)


def _draw(
    task: LanguageModel,
    model: Writer,
    rows: Sequence[np.ndarray],
    tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[np.ndarray]:
    """Draws tokens, see `draw`, whose checks are made before the first token is asked for."""
    n, key, length = model.config.data.segment_length, jax.random.key(seed), np.arange(tokens)
    state = task.memory(model.params, len(rows))
    ids = np.zeros((len(rows), max(map(len, rows)) + len(length)), np.int32)
    for row, start in zip(ids, rows, strict=True):
        row[: len(start)] = start
    before = np.zeros(len(rows), np.int32)  # tokens in the state
    position = np.array([len(start) for start in rows], np.int32)  # of the next token
    for _ in length:
        while (full := position - before > n).any():
            segment = _segments(ids, before, n)
            state = _read(task.model, model.params, state, segment, full[:, None])
            before += n * full
        segment = _segments(ids, before, n)
        token = np.asarray(
            _next(
                task.model,
                top_p < 1,
                model.params,
                state,
                segment,
                position - before,
                position,
                key,
                temperature,
                top_p,
            )
        )
        ids[np.arange(len(rows)), position] = token
        position += 1
        yield token


def _segments(ids: np.ndarray, before: np.ndarray, n: int) -> np.ndarray:
    """The N ids of each row that follow the first `before` [B]; i32 [B, N]."""
    places = before[:, None] + np.arange(n)
    return np.take_along_axis(ids, np.minimum(places, ids.shape[1] - 1), 1)


@functools.partial(jax.jit, static_argnums=0)
def _read(model: SequenceModel, params: Params, state: State, tokens: Array, full: Array) -> State:
    """The state after the segments [B, N] of the rows where `full` [B, 1] is true."""
    return model.step(params, state, tokens, jnp.broadcast_to(full, tokens.shape))[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _next(
    model: SequenceModel,
    nucleus: bool,
    params: Params,
    state: State,
    tokens: Array,
    count: Array,
    position: Array,
    key: Key,
    temperature: Array,
    top_p: Array,
) -> Array:
    """Draws the token i32 [B] after the first `count` [B] tokens of open segments [B, N]."""
    mask = jnp.arange(tokens.shape[1]) < count[:, None]
    hidden, *_ = model.step(params, state, tokens, mask)
    last = jnp.take_along_axis(hidden, count[:, None, None] - 1, 1)[:, 0]
    logits = model.logits(params, last).astype(jnp.float32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, position)
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)
    if nucleus:
        scaled = keep_nucleus(scaled, top_p)
    drawn = jax.vmap(jax.random.categorical)(keys, scaled)
    return jnp.where(temperature > 0, drawn, logits.argmax(-1)).astype(jnp.int32)


def keep_nucleus(logits: Array, top_p: Array) -> Array:
    """Keeps the likeliest tokens whose probabilities add up to `top_p` (Holtzman et al. 2020).

    Args:
      logits: f32 [B, V].
      top_p: f32 [], above 0.

    Returns:
      f32 [B, V], -inf for all other tokens. At least the likeliest token is kept.
    """
    order = jnp.argsort(-logits, axis=-1)
    probability = jax.nn.softmax(jnp.take_along_axis(logits, order, -1), -1)
    before = jnp.cumsum(probability, -1) - probability
    kept = (before < top_p).at[:, 0].set(True)
    rank = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(kept, rank, -1), logits, -jnp.inf)


def decode(tokenizer: Tokenizer, start: Sequence[int], ids: Iterable[int]) -> Iterator[str]:
    """Decodes tokens one by one; the bytes of an incomplete character wait for the next token.

    Each token is decoded together with the ones before it, since it may depend on them.

    Args:
      tokenizer: of the model.
      start: ids of the text before; not yielded.
      ids: the tokens.

    Yields:
      Text that is not empty.
    """
    known = list(start)  # from the first token of the piece before
    text = tokenizer.decode(known)
    read = len(known)
    for token in ids:
        known.append(token)
        longer = tokenizer.decode(known)
        if len(longer) > len(text) and not longer.endswith("\ufffd"):
            yield longer[len(text) :]
            known, read = known[read:], len(known) - read
            text = tokenizer.decode(known)
    if rest := tokenizer.decode(known)[len(text) :]:
        yield rest


def _language_model(model: Writer) -> LanguageModel:
    """The task of a model, if it is a language model."""
    require(model, "generate")
    assert isinstance(model.task, LanguageModel)
    return model.task


def _encoded(model: Writer, prompts: Sequence[str]) -> tuple[Tokenizer, list[np.ndarray]]:
    """The tokenizer, and the ids of each prompt."""
    _language_model(model)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    rows = []
    # Bytes that are not UTF-8 have tokens of their own in a tokenizer of bytes.
    errors = "surrogateescape" if tokenizer.state["kind"] == "bytes" else "strict"
    for prompt in prompts:
        try:
            prompt.encode("utf-8", errors)
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the prompt {prompt!r} has a lone surrogate at place {error.start}, which is no "
                "character: give a valid text"
            ) from error
        if unknown := tokenizer.unknown(prompt):
            raise ValueError(
                f"the prompt has {', '.join(map(repr, unknown))}, which the training texts lack: "
                "write the prompt without"
            )
        ids = tokenizer.encode(prompt)
        if not len(ids):
            raise ValueError(f"the prompt {prompt!r} has no token: give the first words of a text")
        rows.append(ids)
    if not rows:
        raise ValueError("no prompt: give the first words of a text")
    return tokenizer, rows
