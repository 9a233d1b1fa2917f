"""Defaults, descriptions, cached sources and subsets."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from rmjax.data.clicks.simulated import ClicksConfig, SimulatedClicks
from rmjax.data.pipeline import Subset
from rmjax.data.source import Description, Questions, Source, cached
from rmjax.data.texts.sorting import Sorting


class Plain(Source):
    """Four streams, and no optional attribute or method."""

    num_items, max_items, num_queries, positions_at_end = 5, 3, 1, True

    def size(self, split):
        return 4

    def fetch(self, split, indices):
        return {"items": np.zeros((len(indices), 3), np.int32)}


class Full(Plain):
    """All optional attributes and methods; each bucket has two streams."""

    questions = Questions("words", answer="class", classes=2, metric="accuracy")
    feature_width, vocabulary, classes = 7, ["<unk>", "mill"], ["no", "yes"]
    numbering = np.array([30, 10, 20, 50, 40])

    def stream_id(self, split):
        return np.arange(4) // 2

    def buckets(self, split):
        return np.array([0, 0, 1, 1]), [2, 6]

    def groups(self, split):
        return {"first": np.arange(4)[:, None] == 0}

    def references(self, split):
        return {"place": np.arange(4)[:, None]}

    def also(self, split):
        return np.arange(4)[:, None] - 1


def test_optional_attributes_and_methods_have_defaults():
    source = Plain()
    assert source.questions == Questions()
    assert source.numbering is None and source.popularity is None
    assert source.stream_id("train").tolist() == [0, 1, 2, 3] and source.buckets("train") is None
    assert source.groups("train") == source.references("train") == {}
    assert source.also("train") is None
    assert source.describe() == Description(num_items=5, max_items=3, num_queries=1)
    with pytest.raises(TypeError, match="fetch"):
        type("Half", (Source,), {"size": Plain.size})()


def test_a_description_is_the_same_after_json():
    described = Full().describe()
    assert described.numbering == (30, 10, 20, 50, 40) and described.max_segments == 6
    assert Description.from_json(json.loads(json.dumps(described.as_json()))) == described
    world = SimulatedClicks(ClicksConfig()).describe()
    assert world.numbering.startswith("simulated clicks") and world.questions == Questions()
    sorting = Sorting(length=30, segment_length=10).describe()
    assert Description.from_json(json.loads(json.dumps(sorting.as_json()))) == sorting
    with pytest.raises(TypeError, match="later"):
        Description.from_json(world.as_json() | {"later": 1})


def test_a_cached_source_has_the_methods_of_the_source():
    source, kept = Full(), cached(Full(), 2**20)
    assert kept.describe() == source.describe() and kept.stream_id("test").tolist() == [0, 0, 1, 1]
    assert kept.groups("test")["first"].sum() == 1
    assert kept.also("test").tolist() == [[-1], [0], [1], [2]]
    assert kept.fetch("test", np.array([1, 1]))["items"].shape == (2, 3)
    assert pickle.loads(pickle.dumps(kept)).describe() == source.describe()


def test_a_subset_has_the_rows_of_the_source():
    some = Subset(Full(), "test", 2, 0)
    rows = some.references("test")["place"][:, 0]
    assert some.size("test") == 2 == len(set(rows)) and some.vocabulary == ["<unk>", "mill"]
    assert some.also("test")[:, 0].tolist() == (rows - 1).tolist()
    assert some.groups("test")["first"][:, 0].tolist() == (rows == 0).tolist()
    assert some.buckets("test")[0].tolist() == (rows // 2).tolist()
    assert Subset(Plain(), "test", 2, 0).also("test") is None


def test_a_wrapper_has_what_its_source_has():
    source = SimulatedClicks(train=4, valid=4, test=4)
    wrapper = pickle.loads(pickle.dumps(Subset(source, "test", 2, 0)))
    assert wrapper.config == source.config
    with pytest.raises(AttributeError, match="nothing"):
        wrapper.nothing  # noqa: B018
