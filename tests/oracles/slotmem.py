"""Transformers as memories of slots in plain NumPy float64, for one stream.

The queues are Python lists of valid rows. Each pair of rows is attended to on its own.
"""

from __future__ import annotations

import numpy as np

from tests.oracles.rehearsal import dense, embed, softmax, transformer


def rmt(p, items, mask, heads):
    """The memory [K, d] of a Recurrent Memory Transformer after a stream [T, N]."""
    memory = p["slots"]
    for ids, valid in zip(items, mask, strict=True):
        if valid.any():
            tokens = np.concatenate([memory, embed(p, ids)])
            seen = np.concatenate([np.ones(len(memory), bool), valid])
            memory = transformer(p["encoder"], tokens, seen, heads)[: len(memory)]
    return memory


def compressive(p, items, mask, heads, rate, size):
    """The Compressive Transformer as a memory of at most `size` slots.

    Returns:
      The slots after a stream [T, N], a list of [d]; and the (sum, count) of the reconstruction
      loss, summed over segments.
    """
    layers = [p["layers"][f"layer_{i}"] for i in range(len(p["layers"]))]
    recent, old, top = [[] for _ in layers], [[] for _ in layers], []
    total, count, length = 0.0, 0.0, items.shape[1]
    for ids, valid in zip(items, mask, strict=True):
        x = embed(p, ids)
        for i, layer in enumerate(layers):
            after = block(layer, x, valid, old[i], recent[i], length, heads)
            queue = recent[i] + list(x[valid])
            fallen, recent[i] = queue[: max(0, len(queue) - length)], queue[-length:]
            short = compress(p["compression"][i], fallen, rate)
            if fallen:
                difference = plain(layer, x, fallen, heads) - plain(layer, x, short, heads)
                total += (difference[valid] ** 2).sum() / x.shape[1] / len(layers)
                count += valid.sum() / len(layers)
            old[i] = (old[i] + short)[-size:]
            x = after
        outputs = list(norm(p["norm"], x)[valid])
        top = (top + compress(p["compression"][-1], outputs, rate))[-size:]
    return top, (total, count)


def compress(p, rows, rate):
    """Groups of `rate` rows, counted from the end, become one row each."""
    short = []
    for end in range(len(rows), 0, -rate):
        group = rows[max(0, end - rate) : end]
        zeros = [np.zeros(len(group[0]))] * (rate - len(group))
        short.insert(0, np.concatenate(zeros + group) @ p["kernel"] + p["bias"])
    return short


def norm(p, x):
    spread = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return (x - x.mean(-1, keepdims=True)) / spread * p["scale"] + p["bias"]


def block(p, x, mask, old, recent, length, heads):
    """One layer with norms before its parts; a compressed row lies behind all recent places."""
    a, width = p["attention"], x.shape[1] // heads
    rows = [(-length - len(old) + r, row) for r, row in enumerate(old)]
    rows += [(r - len(recent), row) for r, row in enumerate(recent)]
    rows += [(j, x[j]) for j in range(len(x)) if mask[j]]
    out = np.zeros(x.shape)
    for i in range(len(x)):
        q = a["query"]["kernel"] @ norm(p["attention_norm"], x[i])
        scores, values = [], []
        for place, row in rows:
            row = norm(p["attention_norm"], row)
            k, r = a["key"]["kernel"] @ row, a["relative"]["kernel"] @ wave(i - place, len(row))
            u, v = a["content_bias"].ravel(), a["position_bias"].ravel()
            both = (q + u) * k + (q + v) * r
            scores.append(both.reshape(heads, width).sum(1) / np.sqrt(width))
            values.append((a["value"]["kernel"] @ row).reshape(heads, width))
        if rows:
            weights = [softmax(np.array(scores)[:, h]) for h in range(heads)]
            seen = [w @ np.array(values)[:, h] for h, w in enumerate(weights)]
            out[i] = a["out"]["kernel"] @ np.concatenate(seen)
    x = x + out
    y = norm(p["wide_norm"], x)
    return x + dense(p["narrow"], np.maximum(dense(p["wide"], y), 0))


def wave(distance, dim):
    """Sines, then cosines, of a distance at dim / 2 wave lengths."""
    angle = distance / 10_000 ** (np.arange(0, dim, 2) / dim)
    return np.concatenate([np.sin(angle), np.cos(angle)])[:dim]


def plain(p, x, rows, heads):
    """Attention of x [N, d] to rows, without positions and without an output layer."""
    a, width = p["attention"], x.shape[1] // heads
    split = lambda name, y: (norm(p["attention_norm"], y) @ a[name]["kernel"].T).reshape(
        len(y), heads, width
    )
    q, k, v = split("query", x), split("key", np.array(rows)), split("value", np.array(rows))
    out = np.zeros((len(x), heads, width))
    for i, h in np.ndindex(len(x), heads):
        out[i, h] = softmax(k[:, h] @ q[i, h] / np.sqrt(width)) @ v[:, h]
    return out
