"""Streams cut into segments: [B, L] -> [B, T, N] and a mask, on the host."""

from __future__ import annotations

import numpy as np


def segment(
    items: np.ndarray, length: np.ndarray, segment_length: int, num_segments: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts items i32 [B,L], of which the first `length` [B] are valid, into items [B,T,N] and mask bool [B,T,N].

    Front aligned: a stream's last segment may be short, and wholly padded ones follow it; padding holds 0.
    T = `num_segments`, by default ceil(L / N).

    Raises:
      ValueError: a stream is longer than T N items, or N or T is below one.
    """
    batch, longest = items.shape
    if num_segments is None:
        num_segments = -(-longest // segment_length) if segment_length > 0 else 0
    total = num_segments * segment_length
    if segment_length < 1 or num_segments < 1:
        raise ValueError(
            f"segments must be at least 1 of at least 1 item, not {num_segments} of {segment_length}"
        )
    if batch and length.max() > total:
        raise ValueError(
            f"a stream of {length.max()} items does not fit {num_segments} segments of {segment_length}"
        )
    mask = np.arange(total) < np.asarray(length)[:, None]
    padded = np.zeros((batch, total), items.dtype)
    padded[:, :longest] = items[:, :total]
    shape = (batch, num_segments, segment_length)
    return np.where(mask, padded, 0).reshape(shape), mask.reshape(shape)


def position_in_segments(position: np.ndarray, segment_length: int) -> np.ndarray:
    """Segments written before a question that `position` items precede: floor(position / N).

    A question sees full segments only, so up to N - 1 of the items before it are withheld; an N that divides the
    positions loses none.
    """
    return position // segment_length
