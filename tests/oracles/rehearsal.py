"""The equations of rehearsal memory in plain NumPy float64, for one stream and one query.

Each sum is written out. The oracle takes the parameter trees of the model, and nothing else. A mask
says which entries exist.
"""

from __future__ import annotations

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


# Layers.


def embed(p, ids):
    """Returns rows of the item table, scaled to unit variance (Vaswani et al. 2017, 3.4)."""
    return p["embed"][ids] * np.sqrt(p["embed"].shape[-1])


def gru(p, h, x):
    """Cho et al. 2014, with the reset gate after the product: h, x -> new h."""
    d = len(h)
    xr, xz, xn = np.split(x @ p["input"] + p["bias"], 3)
    hr, hz, hn = np.split(h @ p["hidden"], 3)
    reset, keep = sigmoid(xr + hr), sigmoid(xz + hz)
    new = np.tanh(xn + reset * (hn + p["hidden_bias"]))
    assert new.shape == (d,)
    return (1 - keep) * new + keep * h


def bigru(p, x, mask):
    """x [N, d] -> outputs [N, d], zeros where there is no item."""
    out = np.zeros((len(x), 2, len(p["forward"]["hidden_bias"])))
    for way, order in enumerate((range(len(x)), reversed(range(len(x))))):
        h = np.zeros(out.shape[-1])
        for n in order:
            if mask[n]:
                h = out[n, way] = gru(p[("forward", "backward")[way]], h, x[n])
    return out.reshape(len(x), -1)


def dense(p, x):
    """A layer of rmjax.layers.dense: kernel [out, in]."""
    return x @ p["kernel"].T + p["bias"]


def norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def attention(p, x, memory, mask, heads):
    """Vaswani et al. 2017, 3.2: x [X, d] over the entries of memory [Y, e] that exist."""
    query, value = dense(p["query"], x), dense(p["value"], memory)
    key = memory @ p["key"]["kernel"].T
    out, width = np.zeros(x.shape), x.shape[-1] // heads
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for i in range(len(x)):
            scores = key[mask][:, part] @ query[i, part] / np.sqrt(width)
            out[i, part] = softmax(scores) @ value[mask][:, part]
    return dense(p["out"], out)


def transformer(p, x, mask, heads, slots=None):
    """Pre-norm blocks over learned positions, and a last norm: x [X, d] -> [X, d]."""
    x = x + p["positions"]
    for layer in range(sum(name.startswith("layer_") for name in p)):
        block = p[f"layer_{layer}"]
        y = norm(block["self_norm"], x)
        x = x + attention(block["self"], y, y, mask, heads)
        if slots is not None:
            y = norm(block["slot_norm"], x)
            x = x + attention(block["slots"], y, slots, np.ones(len(slots), bool), heads)
        y = norm(block["wide_norm"], x)
        x = x + dense(block["narrow"], np.maximum(dense(block["wide"], y), 0))
    return norm(p["norm"], x)


# The memory machine: Eqs. 1 and 2.


def score(w, a, b):
    """w . tanh(a + b)."""
    return w @ np.tanh(a + b)


def write(p, slots, f, mask, normalize="slots", identity=False, bound=np.inf):
    """Eqs. 1 and 2: slots [K, d] after a segment of features f [N, d]."""
    a, seen = p["attention"], slots + p["slots"] if identity else slots
    of_pair = lambda m, x: score(a["score"], m @ a["slot"], x @ a["item"] + a["bias"])
    alpha = np.array([[of_pair(m, x) for x in f[mask]] for m in seen])
    if normalize == "slots":
        weights = np.stack([softmax(column) for column in alpha.T], 1)
    else:
        weights = np.stack([softmax(row) for row in alpha])
    aligned = [sum(w * x for w, x in zip(row, f[mask], strict=True)) for row in weights]
    update = subspaces if "merge" in p["update"] else gru
    new = [update(p["update"], m, l) for m, l in zip(slots, aligned, strict=True)]
    return np.stack([m / max(1, np.sqrt(np.mean(m**2)) / bound) for m in new])


def subspaces(p, m, l):  # noqa: E741
    """CM Eqs. 2 and 3 for one slot: m [d_m], l [d_x] -> new m."""
    number = len(p["gru"]["bias"])
    parts = []
    for z in range(number):
        width = p["slot"].shape[1] // number
        own = slice(z * width, (z + 1) * width)
        unit = {name: value[z] for name, value in p["gru"].items()}
        parts.append(gru(unit, m @ p["slot"][:, own], l @ p["item"][:, own]))
    return np.concatenate(parts) @ p["merge"]


def memorize(p, items, mask, heads=None, **how):
    """Returns the memory [K, d] of a stream [T, N]; heads=None: the encoder is a bigru."""
    slots = p["slots"]
    for segment, valid in zip(items, mask, strict=True):
        if valid.any():
            x, encoder = embed(p, segment), p["encoder"]
            f = bigru(encoder, x, valid) if heads is None else transformer(encoder, x, valid, heads)
            slots = write(p, slots, f, valid, **how)
    return slots


# The rehearsal: Eqs. 3 and 4, and the decoder.


def decode(p, x, mask, hidden, slots, heads):
    """x [N, d] of one fragment -> [1 + N, d], the first its [cls]."""
    cls, hide = p["tokens"]
    x = np.stack([cls, *(hide if h else item for h, item in zip(hidden, x, strict=True))])
    return transformer(p["decoder"], x, np.array([True, *mask]), heads, slots)


def recollection(recalled, truth, table, sampled):
    """Eq. 3 for one fragment: recalled [M, d] at its masked items, truth [M] -> their mean loss."""
    losses = []
    for r, y in zip(recalled, truth, strict=True):
        right = np.exp(r @ table[y])
        wrong = sum(np.exp(r @ table[j]) for j in sampled if j != y)
        losses.append(-np.log(right / (right + wrong)))
    return np.mean(losses)


def familiarity(positive, negative):
    """Eq. 4 for one pair of logits, both terms with a minus sign."""
    return -np.log(sigmoid(positive)) - np.log(1 - sigmoid(negative))


# The history sampler: Eq. 5.


def sample(p, query, items, mask, valid):
    """query id, stream [T, N] -> beta [T], [e; q]."""
    q = embed(p, query)
    mean = lambda x, m: embed(p, x[m]).mean(0) if m.any() else np.zeros(len(q))
    h = np.stack([mean(x, m) for x, m in zip(items, mask, strict=True)])
    beta = np.array([score(p["score"], q @ p["query"], c @ p["fragment"] + p["bias"]) for c in h])
    e = softmax(beta[valid]) @ h[valid] if valid.any() else np.zeros(len(q))
    return beta, np.concatenate([e, q])


# Reasoning.


def multihop(p, q, slots, mask):
    """CM A.1, hop by hop.

    gamma_k = w tanh(W1 q + W2 m_k + b), e = sum_k softmax(gamma)_k m_k, q <- W_q [e; q].
    Before the first hop slots may attend to each other, and q may have a norm between hops.
    """
    weights = np.zeros(len(slots))
    for r in p.get("mix", ()):
        new = slots.copy()
        for k in range(len(slots)):
            dots = [(slots[k] @ r["query"]) @ (m @ r["key"]) / np.sqrt(len(q)) for m in slots[mask]]
            if dots:
                new[k] += softmax(np.array(dots)) @ (slots[mask] @ r["value"]) @ r["out"]
        slots = new
    for c, hop in enumerate(p["hops"]):
        if c and "norm" in p:
            q = (q - q.mean()) / np.sqrt(q.var() + 1e-6) * p["norm"]["scale"]
        asked = q @ hop["query"]
        gamma = [score(hop["score"], asked, m @ hop["slot"] + hop["bias"]) for m in slots[mask]]
        weights = np.zeros(len(slots))
        weights[mask] = softmax(np.array(gamma)) if mask.any() else 0
        q = np.concatenate([weights @ slots, q]) @ p["merge"]["kernel"] + p["merge"]["bias"]
    return q, weights


def click(p, features, query):
    """A linear layer on [features; query]; a tanh layer before it also sees their product."""
    x = np.concatenate([features, query])
    if "hidden" in p:
        x = np.tanh(np.concatenate([x, features * query]) @ p["hidden"] + p["hidden_bias"])
    return (x @ p["out"] + p["bias"])[0]


def classes(p, features):
    """A linear layer, or one tanh layer before it."""
    if "hidden" in p:
        features = np.tanh(features @ p["hidden"] + p["hidden_bias"])
    return features @ p["out"] + p["bias"]


def sentence(p, words, mask):
    """Both last states of a bidirectional GRU, projected: words [W, d] -> [m]."""
    last = []
    for way, order in (("forward", words[mask]), ("backward", words[mask][::-1])):
        h = np.zeros(len(p["gru"][way]["hidden_bias"]))
        for x in order:
            h = gru(p["gru"][way], h, x)
        last.append(h)
    return np.concatenate(last) @ p["project"]


def click_loss(logit, clicked):
    return -np.log(sigmoid(logit)) if clicked else -np.log(1 - sigmoid(logit))
