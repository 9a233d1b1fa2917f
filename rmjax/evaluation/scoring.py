"""From the scores of a split to numbers: by the source's metric, for all questions and for each of its groups."""

from __future__ import annotations

from typing import Any

import numpy as np

from rmjax import evaluation
from rmjax.data.source import Source
from rmjax.data.texts.documents import Documents
from rmjax.evaluation import Asked, Metric, metrics
from rmjax.registry import METRICS, NoSettings

Scored = dict[
    str, np.ndarray
]  # scores [n, Q] or [n, Q, C], target [n, Q], query_mask [n, Q], example_id [n]


def metric_of(source: Source) -> Metric:
    """What a source's answers are measured by."""
    return METRICS[source.questions.metric].make(NoSettings())


def asked_of(source: Source, split: str, scored: Scored) -> Asked:
    """A split's questions and answers, as metrics take them."""
    also = source.also(split)
    also = None if also is None else also[scored["example_id"]]
    groups = groups_of(source, split, scored)
    return Asked(scored["scores"], scored["target"], scored["query_mask"], also, groups)


def measures(source: Source, split: str, scored: Scored) -> dict[str, float]:
    """{metric: over all questions, group: over its own, what else is reported beside the metric}."""
    return _measures(source, asked_of(source, split, scored))


def _measures(source: Source, asked: Asked) -> dict[str, float]:
    questions = source.questions
    whole, others = metric_of(source).measure(asked)
    if questions.f1:
        chosen, mask = evaluation.chosen(asked), asked.mask
        others["macro_f1"] = metrics.macro_f1(chosen[mask], asked.target[mask], questions.classes)
    return {questions.metric: whole} | others


def better(source: Source, found: dict[str, float]) -> float:
    """What the best checkpoint has most of."""
    value = found[source.questions.metric]
    return -value if metric_of(source).less_is_better else value


def rows(
    source: Source, split: str, name: str, scored: Scored, streams: np.ndarray, seed: int
) -> list[dict[str, Any]]:
    """The final table: the machine `name`, then what the source's references answer to the same questions.

    streams [n]: whose stream each example is; the 95% interval is over these.
    """
    metric, asked = metric_of(source), asked_of(source, split, scored)
    references = {k: v[scored["example_id"]] for k, v in source.references(split).items()}
    readers = {name: scored["scores"]} | references
    users = np.repeat(streams, asked.mask.sum(1))
    table = []
    for reader, scores in readers.items():
        answered = asked._replace(scores=scores)
        (metric_name, value), *others = _measures(source, answered).items()
        low, high = metric.interval(answered, users, seed)
        row = {"memory": reader, f"test_{metric_name}": value, "low": low, "high": high}
        table.append(row | metric.summary(dict(others)) | dict(others))
    return table


def groups_of(source: Source, split: str, scored: Scored) -> dict[str, np.ndarray]:
    """{name: bool [n, Q]} of the source's groups, asked questions only."""
    groups = source.groups(split)
    return {
        name: inside[scored["example_id"]] & scored["query_mask"] for name, inside in groups.items()
    }


def perplexities(documents: Documents, nats: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """Of a text, whose segments' sums of -log p and numbers of predicted tokens these are, both of one shape.

    'perplexity': exp of the mean over tokens. 'segment_perplexity': the mean over segments of theirs, which is larger;
    it is what the released code of Memoria reports, there of all but each segment's first token. By 'word', and
    'bits_per_character': the mean over tokens, times tokens in a word or character of the text; both are left out where
    the tokens are not all of the text.
    """
    nats, tokens = np.asarray(nats, np.float64), np.asarray(tokens, np.float64)
    mean, size, read = nats.sum() / tokens.sum(), len(documents.tokens), tokens > 0
    found = {
        "perplexity": float(np.exp(mean)),
        "segment_perplexity": float(np.exp(nats[read] / tokens[read]).mean()),
    }
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
