"""From the scores of a split to numbers: the source's metric, over all questions and per group."""

from __future__ import annotations

import numpy as np

from rmjax import evaluation
from rmjax.data.source import Source
from rmjax.data.texts.documents import Documents
from rmjax.evaluation import Asked, Metric, metrics
from rmjax.registry import METRICS, NoSettings

Scored = dict[str, np.ndarray]
"""scores [n, Q] or [n, Q, C], target [n, Q], query_mask [n, Q], example_id [n].

Also items_before [n, Q], which `by_history` and sampled metrics read.
"""


def metric_of(source: Source, name: str = "") -> Metric:
    """The metric that the source names in its questions."""
    return METRICS[name or source.questions.metric].make(NoSettings())


def check_metric(source: Source, name: str) -> None:
    """Raises ValueError if a metric does not measure the form of answers that a source has."""
    form, answers = source.questions.answer, metric_of(source, name).answers
    if form not in answers:
        raise ValueError(
            f"config.train.metric = {name!r} measures answers of the form {' or '.join(answers)}, "
            f"but those of this data are {form}: leave it empty for {source.questions.metric!r}"
        )


def asked_of(source: Source, split: str, scored: Scored) -> Asked:
    """The questions and answers of a split, in the form that metrics take."""
    also = source.also(split)
    also = None if also is None else also[scored["example_id"]]
    groups = groups_of(source, split, scored)
    answers = scored["scores"], scored["target"], scored["query_mask"]
    return Asked(*answers, also, groups, scored.get("items_before"), source.num_items)


def measures(source: Source, split: str, scored: Scored, metric: str = "") -> dict[str, float]:
    """All measures of a split: {name of the metric: over all questions, name of a group: ..., ...}.

    Args:
      source: where the questions come from.
      split: 'train', 'valid' or 'test'.
      scored: the answers.
      metric: name of the metric; '': the source's own.

    Returns:
      The metric first, then its value in each group and the metric's further values.
    """
    return _measures(source, asked_of(source, split, scored), metric)


def _measures(source: Source, asked: Asked, metric: str) -> dict[str, float]:
    questions = source.questions
    value, others = metric_of(source, metric).measure(asked)
    if questions.f1:
        chosen, mask = evaluation.chosen(asked), asked.mask
        others["macro_f1"] = metrics.macro_f1(chosen[mask], asked.target[mask], questions.classes)
    return {metric or questions.metric: value} | others


def objective(source: Source, measured: dict[str, float], metric: str = "") -> float:
    """The number that is largest for the best checkpoint, from the result of `measures`."""
    value = measured[metric or source.questions.metric]
    return -value if metric_of(source, metric).less_is_better else value


def rows(
    source: Source,
    split: str,
    name: str,
    scored: Scored,
    streams: np.ndarray,
    seed: int,
    metric: str = "",
) -> list[dict[str, str | float]]:
    """The rows of the final table: the machine, then the source's references on the same questions.

    Args:
      source: where the questions come from.
      split: 'train', 'valid' or 'test'.
      name: name of the machine in the table.
      scored: the machine's answers.
      streams: [n], the stream of each example; the 95 % interval is over streams.
      seed: seed of the interval.
      metric: name of the metric; '': the source's own.

    Returns:
      One row for each reader, the machine first.
    """
    asked = asked_of(source, split, scored)
    references = {k: v[scored["example_id"]] for k, v in source.references(split).items()}
    readers = {name: scored["scores"]} | references
    users = np.repeat(streams, asked.mask.sum(1))
    table: list[dict[str, str | float]] = []
    for reader, scores in readers.items():
        answered = asked._replace(scores=scores)
        (metric_name, value), *others = _measures(source, answered, metric).items()
        low, high = metric_of(source, metric).interval(answered, users, seed)
        row = {f"test_{metric_name}": value, "low": low, "high": high}
        row |= metric_of(source, metric).summary(dict(others)) | dict(others)
        table.append({"memory": reader, **row})
    return table


def by_history(
    source: Source, split: str, scored: Scored, metric: str = "", parts: int = 5
) -> list[dict[str, str | float]]:
    """The metric by the number of items before a question.

    Args:
      source: where the questions come from.
      split: 'train', 'valid' or 'test'.
      scored: the answers, with items_before [n, Q].
      metric: name of the metric; '': the source's own.
      parts: how many parts of about as many questions each; fewer where histories are equal.

    Returns:
      One row for each part, the shortest histories first.
    """
    asked, before = asked_of(source, split, scored), scored["items_before"]
    edges = np.unique(np.quantile(before[asked.mask], np.linspace(0, 1, parts + 1)).astype(int))
    part = np.clip(np.searchsorted(edges, before, "right") - 1, 0, max(0, len(edges) - 2))
    lines: list[dict[str, str | float]] = []
    for number in np.unique(part[asked.mask]):
        inside = asked.mask & (part == number)
        (name, value), *_ = _measures(
            source, asked._replace(mask=inside, groups={}), metric
        ).items()
        ends = f"{before[inside].min():,} to {before[inside].max():,}"
        lines.append({"items before": ends, "questions": int(inside.sum()), f"test {name}": value})
    return lines


def groups_of(source: Source, split: str, scored: Scored) -> dict[str, np.ndarray]:
    """The source's groups, {name: bool [n, Q]}, restricted to the asked questions."""
    ids, mask = scored["example_id"], scored["query_mask"]
    return {name: inside[ids] & mask for name, inside in source.groups(split).items()}


def perplexities(documents: Documents, nats: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """The perplexities of a text.

    Two perplexities over tokens are reported, since papers do not say which one they mean.

    Args:
      documents: the text.
      nats: the sum of -log p over each segment.
      tokens: the number of predicted tokens of each segment, in the same shape.

    Returns:
      'perplexity': exp(mean loss over tokens). 'segment_perplexity': the mean over segments of
      exp(loss), which is larger. The released code of Memoria reports the latter, but leaves out
      the first token of each segment. 'word_perplexity' and 'bits_per_character' multiply the mean
      loss by the tokens per word or per character of the text. These two are left out where the
      tokens do not hold the complete text.
    """
    nats, tokens = np.asarray(nats, np.float64), np.asarray(tokens, np.float64)
    mean, size, read = nats.sum() / tokens.sum(), len(documents.tokens), tokens > 0
    result = {
        "perplexity": float(np.exp(mean)),
        "segment_perplexity": float(np.exp(nats[read] / tokens[read]).mean()),
    }
    if not documents.tokenizer.lossless:
        return result
    return result | {
        "word_perplexity": float(np.exp(min(mean * size / max(documents.words, 1), 700.0))),
        "bits_per_character": float(mean * size / documents.characters / np.log(2)),
    }


def memory_gain(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """How much the memory improves the rehearsal losses.

    Args:
      sums: results of `Task.rehearsals`, over all streams.

    Returns:
      memory_gain_recollection, memory_gain_familiarity: the loss with another stream's memory minus
        the loss with the own memory, in nats. They are means over fragments, NaN without fragments.
      memory_spread: the standard deviation over streams of an entry of the slots; 0 where all
        memories are equal.
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
