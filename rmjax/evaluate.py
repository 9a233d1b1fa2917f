"""From the scores of a split to numbers: by the source's metric, for all questions and for each of its groups."""

from __future__ import annotations

from typing import Any

import numpy as np

from rmjax import metrics
from rmjax.data.documents import Documents
from rmjax.data.source import Questions, Source

Scored = dict[str, np.ndarray]  # scores [n, Q] or [n, Q, C], target [n, Q], query_mask [n, Q], example_id [n]


def metric_of(source: Source) -> str:
    """auc, accuracy, mrr, or error, of which less is better."""
    return getattr(source, "questions", Questions()).metric


def measures(source: Source, split: str, scored: Scored) -> dict[str, float]:
    """{metric: over all questions, group: over its own}; 'error' is the mean over the groups."""
    metric, mask = metric_of(source), scored["query_mask"]
    if metric == "auc":
        return {"auc": metrics.auc(scored["scores"], scored["target"], mask)}
    values, groups = question_values(source, split, scored), groups_of(source, split, scored)
    each = {name: float(values[inside].mean()) for name, inside in groups.items() if inside.any()}
    questions = getattr(source, "questions", Questions())
    if questions.f1:
        scores = scored["scores"]
        chosen = scores if scores.ndim == mask.ndim else scores.argmax(-1)
        each["macro_f1"] = metrics.macro_f1(chosen[mask], scored["target"][mask], questions.classes)
    if metric == "mrr":
        each["answer 1 alone"] = float((1 / rank(scored["scores"], scored["target"]))[mask].mean())
    whole = float(np.mean(list(each.values()))) if metric == "error" and each else float(values[mask].mean())
    return {metric: whole} | each


def better(source: Source, found: dict[str, float]) -> float:
    """What the best checkpoint has most of."""
    metric = metric_of(source)
    return -found[metric] if metric == "error" else found[metric]


def rows(source: Source, split: str, name: str, scored: Scored, streams: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """The final table: the machine `name`, then what the source's references answer to the same questions.

    streams [n]: whose stream each example is; the 95% interval is over these.
    """
    metric, mask = metric_of(source), scored["query_mask"]
    references = source.references(split) if hasattr(source, "references") else {}
    readers = {name: scored["scores"]} | {k: v[scored["example_id"]] for k, v in references.items()}
    table = []
    for reader, scores in readers.items():
        its = scored | {"scores": scores}
        whole, *others = measures(source, split, its).items()
        users = np.repeat(streams, mask.sum(1))
        if metric == "auc":
            low, high = metrics.bootstrap(scores[mask], scored["target"][mask], users, seed=seed)
        else:
            values, groups = question_values(source, split, its)[mask], groups_of(source, split, its)
            inside = np.stack(list(groups.values()))[:, mask].argmax(0) if metric == "error" and groups else None
            low, high = metrics.bootstrap_mean(values, users, inside, seed=seed)
        row = {"memory": reader, f"test_{metric}": whole[1], "low": low, "high": high}
        if metric == "error" and others:
            row["under_5%"] = sum(error < 0.05 for _, error in others)
        table.append(row | dict(others))
    return table


def groups_of(source: Source, split: str, scored: Scored) -> dict[str, np.ndarray]:
    """{name: bool [n, Q]} of the source's groups, asked questions only."""
    if not hasattr(source, "groups"):
        return {}
    groups = source.groups(split)  # type: ignore[attr-defined]
    return {name: inside[scored["example_id"]] & scored["query_mask"] for name, inside in groups.items()}


def perplexities(documents: Documents, nats: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """Of a text, whose segments' sums of -log p and numbers of predicted tokens these are, both of one shape.

    'perplexity': exp of the mean over tokens. 'segment_perplexity': the mean over segments of theirs, which is larger;
    it is what the released code of Memoria reports, there of all but each segment's first token. By 'word', and
    'bits_per_character': the mean over tokens, times tokens in a word or character of the text; both are left out where
    the tokens are not all of the text.
    """
    nats, tokens = np.asarray(nats, np.float64), np.asarray(tokens, np.float64)
    mean, size, read = nats.sum() / tokens.sum(), len(documents.tokens), tokens > 0
    found = {"perplexity": float(np.exp(mean)), "segment_perplexity": float(np.exp(nats[read] / tokens[read]).mean())}
    if not documents.tokenizer.lossless:
        return found
    return found | {
        "word_perplexity": float(np.exp(min(mean * size / max(documents.words, 1), 700.0))),
        "bits_per_character": float(mean * size / documents.characters / np.log(2)),
    }


def memory_gain(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """What a rehearsal owes to the memory, of `Task.rehearsals` over all streams.

    Returns:
      memory_gain_recollection, memory_gain_familiarity: the loss with another stream's memory minus that with the
        stream's own, in nats, means over the fragments; NaN where there are none.
      memory_spread: the standard deviation of an entry of the slots over the streams, 0 where all memories are alike.
    """
    gains = {}
    for name, of_streams in sums.items():
        total = np.asarray(of_streams, np.float64).sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            if name == "spread":
                gains["memory_spread"] = float(np.sqrt(total[0] / total[1]))
            else:
                gains[f"memory_gain_{name}"] = float((total[1] - total[0]) / total[2])
    return gains


def question_values(source: Source, split: str, scored: Scored) -> np.ndarray:
    """f64 [n, Q], what the metric is the mean of; NaN where a score is. Scores [n, Q] are answers and not logits."""
    scores, target, metric = scored["scores"], scored["target"], metric_of(source)
    wrong = np.isnan(scores).any(-1) if scores.ndim > target.ndim else np.zeros(target.shape, bool)
    if metric == "mrr":
        ranks = rank(scores, target)
        if hasattr(source, "also"):
            also = source.also(split)[scored["example_id"]]
            ranks = np.where(also < 0, ranks, np.minimum(ranks, rank(scores, np.maximum(also, 0))))
        return np.where(wrong, np.nan, 1 / ranks)
    chosen = scores if scores.ndim == target.ndim else scores.argmax(-1)
    return np.where(wrong, np.nan, chosen != target if metric == "error" else chosen == target)


def rank(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """f64 [n, Q], the place of the right one of [n, Q, C], the best being 1; among equals the middle."""
    right = np.take_along_axis(logits, target[..., None], -1)
    equal = (logits == right).sum(-1) - 1
    return 1 + (logits > right).sum(-1) + equal / 2
