"""Cuts streams into segments on the host: [B, L] -> [B, T, N] and a mask."""

from __future__ import annotations

import numpy as np


def segment(
    items: np.ndarray, length: np.ndarray, segment_length: int, num_segments: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts streams into segments of N items.

    Segments are aligned to the front: the last segment of a stream may be short, and completely
    padded ones follow it. Padding holds 0.

    Args:
      items: i32 [B, L].
      length: i [B], number of valid items at the front of each stream.
      segment_length: N.
      num_segments: T; default ceil(L / N).

    Returns:
      (items [B, T, N], mask bool [B, T, N], true where an item is).

    Raises:
      ValueError: a stream is longer than T N items, or N or T is below one.
    """
    batch, longest = items.shape
    if num_segments is None:
        num_segments = -(-longest // segment_length) if segment_length > 0 else 0
    total = num_segments * segment_length
    if segment_length < 1 or num_segments < 1:
        raise ValueError(
            "num_segments and segment_length must be at least 1, "
            f"not {num_segments} and {segment_length}"
        )
    if batch and length.max() > total:
        raise ValueError(
            f"a stream of {length.max()} items does not fit {num_segments} segments of "
            f"{segment_length}: raise num_segments, or shorten the stream"
        )
    mask = np.arange(total) < np.asarray(length)[:, None]
    padded = np.zeros((batch, total), items.dtype)
    padded[:, :longest] = items[:, :total]
    shape = (batch, num_segments, segment_length)
    return np.where(mask, padded, 0).reshape(shape), mask.reshape(shape)


def position_in_segments(position: np.ndarray, segment_length: int) -> np.ndarray:
    """Counts the segments that are written before a question: floor(position / N).

    A question sees full segments only, so up to N - 1 of the items before it are withheld. No item
    is withheld if N divides the positions.

    Args:
      position: i [...], number of items before each question.
      segment_length: N.

    Returns:
      i [...], number of full segments before each question.
    """
    return position // segment_length
