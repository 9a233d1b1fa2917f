"""What each endpoint does, without HTTP: a checked body becomes calls of the store and a reply."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import numpy as np

from rmjax.serve.checks import plain_users
from rmjax.serve.http import bodies
from rmjax.serve.http.bodies import Refused
from rmjax.serve.model import Model
from rmjax.serve.store import Damaged, QueueFull, StreamInfo, Streams, of_items

_NUMBERS = 1_000_000  # most numbers of a reply, about 10 MB of JSON
# Numbers of ranked items, and of items that are left out. Each pair is compiled: the small ones
# before the service is ready, the others when they are first asked for.
_K, _LEFT_OUT = (16, 128), (1, 64)
P = ParamSpec("P")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Limits:
    """The most that one request may ask for."""

    body: int = 1 << 20  # bytes
    users: int = 64
    items: int = 10_000  # ids of all users together
    seconds: float = 10.0  # for a client to send a request, and to read the reply


class Service:
    """Serves the streams of one model. The event loop never waits for the device or the disk.

    Args:
      model: the model of the streams, which knows the ids of the items.
      streams: the store. The caller closes it.
      limits: the most that one request may ask for.
      waiting: most requests other than writes, answers and recommendations that wait for a thread;
        the store counts those three itself.

    Attributes:
      ready: whether everything is compiled, so that requests are served.
      closing: whether the server shuts down, so that requests are refused.
    """

    def __init__(
        self, model: Model, streams: Streams, limits: Limits | None = None, waiting: int = 64
    ):
        questions = of_items(model.task).answers.questions
        self.streams, self.limits = streams, limits or Limits()
        self.ready = self.closing = False
        self._names = model.names
        self._kinds = questions.kinds  # 0: queries are items
        items = model.description.num_items
        self._width = items if questions.answer == "item" else max(1, questions.classes)
        self._no_ranking = _no_ranking(model)
        self._pool = ThreadPoolExecutor(4, "http")
        self._waiting, self._most_waiting = 0, waiting

    def compile(self) -> None:
        """Compiles every shape; afterwards requests are served."""
        self._names.indices([])  # builds the index
        self.streams.compile()
        self.streams.memory("")
        if not self._no_ranking:
            for power in range(self.limits.users.bit_length()):  # all sizes of batches
                users = [""] * (1 << power)
                for k in sorted({min(k, len(self._names.ids)) for k in _K}):
                    for width in _LEFT_OUT:
                        self.streams.recommend(users, k, [[0] * width] * len(users))
        self.ready = True

    async def write(self, body: bodies.Write) -> bodies.Written:
        """Appends items to the streams of users."""
        self._check(body.users, items=body.items, expected_lengths=body.expected_lengths)
        items, unknown = self._known(body.items)
        left = [ids[ids >= 0] for ids in items]
        written = self.streams.write_soon(body.users, left, body.expected_lengths)
        lengths = await asyncio.wrap_future(written)
        return bodies.Written(lengths, unknown)

    async def answer(self, body: bodies.Ask) -> bodies.Answered:
        """Answers queries from the memories of users."""
        self._check(body.users, queries=body.queries)
        count = sum(map(len, body.queries)) * self._width
        if count > _NUMBERS:
            cure = f"ask fewer queries at once, at most {_NUMBERS // self._width}"
            raise Refused(413, f"the reply has {count:,} numbers: {cure}", "queries")
        queries, unknown = self._asked(body.queries)
        known = [ids >= 0 for ids in queries]
        asked = [ids[mask] for ids, mask in zip(queries, known, strict=True)]
        rows = await asyncio.wrap_future(self.streams.answer_soon(body.users, asked))
        answers = [row.tolist() for row in rows]
        if unknown:
            for mask, row in zip(known, answers, strict=True):
                scores = iter(row)
                row[:] = [next(scores) if one else None for one in mask.tolist()]
        return bodies.Answered(answers, unknown)

    async def recommend(self, body: bodies.Recommend) -> bodies.Recommendations:
        """Recommends the best next items of users."""
        if self._no_ranking:
            raise Refused(404, self._no_ranking)
        self._check(body.users, exclude=body.exclude)
        most = len(self._names.ids)
        if body.k > most:
            raise Refused(
                400, f"k = {body.k}: the model has {most} items: ask for at most {most}", "k"
            )
        exclude, unknown = self._known(body.exclude or [()] * len(body.users))
        k = min(most, next((k for k in _K if body.k <= k), 1 << (body.k - 1).bit_length()))
        left_out = [_repeated(ids[ids >= 0]) for ids in exclude]
        asked = self.streams.recommend_soon(body.users, k, left_out)
        scores, items = await asyncio.wrap_future(asked)
        cut = [row[row >= 0] for row in items[:, : body.k]]
        best = [row[: len(ids)].tolist() for row, ids in zip(scores, cut, strict=True)]
        return bodies.Recommendations([self._names.ids[ids].tolist() for ids in cut], best, unknown)

    async def fork(self, body: bodies.Fork) -> bodies.Done:
        """Copies the stream of a user to new users."""
        self._check(body.copies, "copies")
        await self.in_thread(self.streams.fork, body.user, body.copies)
        return bodies.Done(len(body.copies))

    async def reset(self, body: bodies.Reset) -> bodies.Done:
        """Forgets users; a later write begins a new stream."""
        self._check(body.users)
        await self.in_thread(self.streams.reset, body.users)
        return bodies.Done(len(body.users))

    async def info(self, query: bodies.OfUser, name: str) -> bodies.Info:
        """The length, the age and the bytes of a user's stream."""
        user = _user(query, name)
        about = await self.in_thread(self._info, user)
        age = max(0.0, time.time() - about.written)
        return bodies.Info(user, about.length, age, about.bytes)

    async def memory(self, query: bodies.OfUser, name: str) -> bodies.Memory:
        """The numbers of a user's memory."""
        user = _user(query, name)
        return await self.in_thread(self._memory, user)

    async def items(self, query: bodies.Search) -> bodies.Items:
        """Items of the catalogue whose ids contain a text."""
        return await self.in_thread(self._search, query)

    def _info(self, user: bodies.User) -> StreamInfo:
        plain_users([user])  # a name that is too long gets 400, not 404
        try:
            return self.streams.info(user)
        except Damaged:
            raise
        except ValueError as error:
            raise Refused(404, str(error), user=user) from error

    def _search(self, query: bodies.Search) -> bodies.Items:
        ids, text = self._names.ids, query.query.casefold()
        fits = (one for one in map(_plain, ids) if text in str(one).casefold())
        shown = list(itertools.islice(fits, query.limit))
        return bodies.Items(shown, len(ids), not self._no_ranking, not self._kinds)

    def _memory(self, user: bodies.User) -> bodies.Memory:
        memory = self.streams.memory(user)
        leaves = {
            field.name: np.asarray(getattr(memory, field.name))
            for field in dataclasses.fields(memory)
        }
        count = sum(leaf.size for leaf in leaves.values())
        if count > _NUMBERS:
            cure = "read it with Streams.memory"
            raise Refused(413, f"the memory has {count:,} numbers, too many for a reply: {cure}")
        slots = leaves.get("slots")
        if slots is not None and slots.ndim == 2:
            return bodies.Memory(slots.tolist(), {})
        return bodies.Memory(None, {name: leaf.tolist() for name, leaf in leaves.items()})

    def _check(
        self,
        users: Sequence[bodies.User],
        field: str = "users",
        **lists: Sequence[object] | None,
    ) -> None:
        """Raises Refused unless each list has one entry a user, and the limits hold."""
        if len(users) > self.limits.users:
            cure = f"send at most {self.limits.users} in a request"
            raise Refused(413, f"{len(users)} users: {cure}", field)
        for name, entries in lists.items():
            if entries is None:
                continue
            if len(entries) != len(users):
                cure = "give one for each user"
                raise Refused(400, f"{len(entries)} {name} for {len(users)} users: {cure}", name)
            count = sum(len(ids) for ids in entries if isinstance(ids, list))
            if count > self.limits.items:
                cure = f"send at most {self.limits.items:,} in a request"
                raise Refused(413, f"{count:,} ids: {cure}", name)

    def _known(self, lists: Sequence[Sequence[bodies.Id]]) -> tuple[list[np.ndarray], int]:
        """The index of each item, -1 for unknown ones; and the number of unknown ones."""
        indices = self._names.indices([one for ids in lists for one in ids])
        ends = np.cumsum([len(ids) for ids in lists])[:-1]
        return np.split(indices, ends), int((indices < 0).sum())

    def _asked(self, lists: Sequence[Sequence[bodies.Id]]) -> tuple[list[np.ndarray], int]:
        """The queries as numbers, -1 for unknown items; and the number of unknown items."""
        if not self._kinds:
            return self._known(lists)
        for ids in lists:
            for one in ids:
                if not isinstance(one, int) or not 0 <= one < self._kinds:
                    cure = f"kinds of question are numbers from 0 to {self._kinds - 1}"
                    raise Refused(400, f"queries has {one!r:.50}: {cure}", "queries")
        return [np.array(ids, np.int32) for ids in lists], 0

    async def in_thread(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a call that may wait for the device or the disk.

        Raises:
          QueueFull: too many such calls wait already.
        """
        if self._waiting >= self._most_waiting:
            raise QueueFull(f"{self._waiting} requests wait already: try again later")
        self._waiting += 1
        try:
            call = functools.partial(act, *args, **kwargs)
            return await asyncio.get_running_loop().run_in_executor(self._pool, call)
        finally:
            self._waiting -= 1


def _repeated(ids: np.ndarray) -> np.ndarray:
    """Ids that are repeated until their number is one of `_LEFT_OUT`, if there are few."""
    size = next((size for size in _LEFT_OUT if len(ids) <= size), len(ids))
    return np.resize(ids, size) if len(ids) else ids


def _no_ranking(model: Model) -> str:
    """Why the model does not recommend; empty if it does."""
    try:
        model.recommender  # noqa: B018
    except ValueError as error:
        return str(error)
    return ""


def _user(query: bodies.OfUser, name: str) -> bodies.User:
    """The user whom a path names."""
    if query.type == "str":
        return name
    user = int(name) if re.fullmatch("-?[0-9]{1,19}", name) else 1 << 63
    if str(user) != name or not -(2**63) <= user < 2**63:
        raise Refused(400, f"{name!r:.50} is no integer of 64 bits: leave ?type=int out", "type")
    return user


def _plain(one: object) -> bodies.Id:
    """An id as a Python number or string."""
    value: bodies.Id = one.item() if isinstance(one, np.generic) else one  # type: ignore[assignment]
    return value
