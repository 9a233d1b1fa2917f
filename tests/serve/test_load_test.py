"""A load test keeps each user's order, counts latencies from the plan, and sees wrong answers."""

from __future__ import annotations

import time

import numpy as np
import pytest

from rmjax.data.source import Questions
from rmjax.serve import load_test, traffic
from rmjax.serve.traffic import BASES, Names, Request
from rmjax.tasks.answers import Answers
from rmjax.tasks.ranking import Ranking
from rmjax.tasks.reasoning import Reasoning
from tests.serve.test_streams import PARAMS, SHAPES, TASK, offline, streams
from tests.small import DIM, ITEMS, N, noise, rehearsal


class Recorded:
    """A service that keeps the calls, and answers with the number of items before."""

    def __init__(self, seconds: float = 0.0, refused: str = ""):
        self.seconds, self.refused, self.lengths, self.calls = seconds, refused, {}, []

    def write(self, users, items, expected_lengths=None):
        self._call("write", *users, len(items[0]))
        self.lengths[users[0]] = self.lengths.get(users[0], 0) + len(items[0])
        return [self.lengths[users[0]]]

    def answer(self, users, queries):
        self._call("answer", *users, len(queries[0]))
        return [np.full(len(queries[0]), self.lengths.get(users[0], 0), np.float32)]

    def fork(self, user, copies):
        self._call("fork", user, len(copies))
        assert not set(copies) & set(self.lengths)
        self.lengths |= dict.fromkeys(copies, self.lengths[user])

    def reset(self, users):
        self._call("reset", *users)
        for user in users:
            del self.lengths[user]

    def __contains__(self, user):
        return user in self.lengths

    def _call(self, name, user, *more):
        time.sleep(self.seconds)
        if user == self.refused:
            raise ConnectionResetError(user)
        self.calls.append((name, user, *more))


def test_a_user_s_requests_keep_their_order():
    """Requests arrive at once, so a user's writes and questions alternate."""
    wanted = traffic.requests(rate=1e6, seconds=2e-4, users=5, items=ITEMS)
    assert len(wanted) == 200 and 60 < sum(request.writes for request in wanted) < 140
    served = traffic.serve(streams(), wanted, Names(0), threads=8)
    assert (served.seconds > 0).all() and served.seconds.max() < 60 and not served.errors
    histories: dict = {}
    for request, answer in zip(wanted, served.answers, strict=True):
        if request.writes:
            histories[request.user] = [*histories.get(request.user, []), *request.ids]
            assert answer is None
        elif len(histories.get(request.user, [])) < 40 * N:
            query = request.ids[:8]
            expected = offline()(histories.get(request.user, []), query)
            np.testing.assert_allclose(answer[:8], expected, rtol=1e-4, atol=1e-5)


def test_questions_may_be_about_kinds():
    wanted = traffic.requests(1e4, 0.05, users=3, items=50, kinds=4)
    asked = [request.ids for request in wanted if not request.writes]
    assert set(np.concatenate(asked).tolist()) == {0, 1, 2, 3}


def test_a_latency_counts_from_the_planned_arrival():
    """Three requests of 200 ms arrive together. One thread serves one after another."""
    wanted = [Request(0.0, user, np.arange(1), True) for user in range(3)]
    one = traffic.serve(Recorded(seconds=0.2), wanted, Names(0), threads=1).seconds
    assert (one >= [0.2, 0.4, 0.6]).all()
    three = traffic.serve(Recorded(seconds=0.2), wanted, Names(0), threads=3).seconds
    assert (three >= 0.2).all() and three.max() < 0.55
    later = [Request(0.5, 0, np.arange(1), True)]
    assert 0.2 <= traffic.serve(Recorded(seconds=0.2), later, Names(0)).seconds[0] < 0.5


def test_errors_are_counted_and_have_no_latency():
    wanted = [Request(0.0, user % 2, np.arange(1), True) for user in range(6)]
    served = traffic.serve(Recorded(refused="9-1"), wanted, Names(9))
    assert served.errors == {"ConnectionResetError": 3}
    assert np.isnan(served.seconds).tolist() == [False, True] * 3
    shown = load_test.summary(wanted, served)
    assert shown["errors"] == {"ConnectionResetError": 3} and shown["write_ms"]["p100"] < 1000


def test_filling_goes_on_and_begins_anew_with_the_users_that_are_checked():
    service, names, users = Recorded(), Names(30, np.arange(ITEMS) + 1000), 1300
    load_test.fill(service, names, ITEMS, 700, [])
    assert len(service.lengths) == 700 + BASES
    service.write(["30-3"], [[1]])
    service.calls.clear()
    load_test.fill(service, names, ITEMS, users, [3, 1299])
    assert service.lengths.keys() >= {names.user(user) for user in range(users)}
    assert service.lengths["30-3"] == 30 and ("reset", "30-3") in service.calls
    assert not any(call[0] == "write" and call[2] for call in service.calls)
    load_test.fill(service, names, ITEMS, users, [])
    forked = sum(call[2] for call in service.calls if call[0] == "fork")
    assert forked == 600 + 1


def test_filling_goes_on_after_an_interruption():
    """It ended in the middle of a history, or after the copies of some histories."""
    service, names, users = Recorded(), Names(12_000), 1500
    service.lengths["12000-base-2"] = 10_000
    load_test.fill(service, names, ITEMS, users, [])
    assert {service.lengths[names.user(user)] for user in range(users)} == {12_000}
    for user in [*range(801, 1500, 8), *range(402, 1500, 8), 9]:
        del service.lengths[names.user(user)]
    load_test.fill(service, names, ITEMS, users, [9, 10])
    assert {service.lengths[names.user(user)] for user in range(users)} == {12_000}
    service.lengths["12000-base-3"] += 1
    with pytest.raises(ValueError, match="'12000-base-3' has 12001 items, not 12000: reset it"):
        load_test.fill(service, names, ITEMS, users, [])


def test_a_schedule_without_requests_is_refused():
    with pytest.raises(ValueError, match="--rate=1 --seconds=0.4: no request"):
        traffic.requests(1, 0.4, users=3, items=50)


@pytest.mark.parametrize("last", [False, True])
def test_rankings_are_compared(last):
    """A model that ranks is asked about its only kind; it may read the last item, too."""
    questions = Questions(query="kind", answer="item", kinds=1)
    ranking = Ranking(ITEMS, last=last)
    task = Reasoning(TASK.machine, Answers(questions, DIM, DIM, ranking=ranking), rehearsal(), N)
    params = noise(task.init)
    wanted = traffic.requests(rate=1e4, seconds=0.002, users=2, items=ITEMS, kinds=1)
    options = {"batches": (8,), "queries": (16,), "capacity": 4}
    result = load_test.measure_streams(task, params, wanted, 2, Names(30), 2, **options)
    assert result["errors"] == {} and result["largest_difference"] < 1e-5


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_wrong_numbers_and_shapes_show_in_the_difference(wrong):
    wanted = [Request(0.0, user, np.arange(2), False) for user in (0, 1)]
    bases, right = load_test._bases(8, ITEMS), streams(**SHAPES)
    right.write(["8-0", "8-1"], [bases[0], bases[1]])
    answers = right.answer(["8-0", "8-1"], [[0, 1], [0, 1]])
    answers[0] = answers[0] * np.nan if np.isnan(wrong) else answers[0][:1]
    served = traffic.Served(np.ones(2), list(answers), None)
    how = TASK, PARAMS, bases, wanted, served, {0: 0, 1: 1}
    np.testing.assert_equal(load_test.largest_difference(*how), wrong)
    assert load_test._in_json({"a": {"p": wrong, "q": 1.5}}) == {"a": {"p": None, "q": 1.5}}


@pytest.mark.parametrize("users", [1, 20])
def test_the_difference_from_offline_evaluation(users):
    wanted = traffic.requests(rate=1e4, seconds=0.01, users=users, items=ITEMS)
    options = {"batches": (8,), "queries": (16,), "capacity": 4}
    result = load_test.measure_streams(TASK, PARAMS, wanted, users, Names(30), 2, **options)
    assert result["users"] == users and result["requests"] == 100 and result["errors"] == {}
    assert result["largest_difference"] < 1e-5
    assert 0 < result["all_ms"]["p50"] <= result["all_ms"]["p99"] <= result["all_ms"]["p100"]
    assert result["cores"]["process"] > 0


def test_a_lost_write_shows_in_the_difference():
    wanted = traffic.requests(rate=1e4, seconds=0.005, users=2, items=ITEMS)
    assert wanted[1].writes
    store = streams(**SHAPES)
    lost = [*wanted[:1], wanted[1]._replace(ids=wanted[1].ids[:0]), *wanted[2:]]
    serve_all = lambda: traffic.serve(store, lost, Names(30))
    result = load_test.run_test(TASK, PARAMS, store, serve_all, wanted, 2, Names(30))
    assert result[1]["largest_difference"] > 1e-3
