"""Checks of what callers give to a store: users, ids, and rows that were read from files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rmjax.serve.database import User, check_user
from rmjax.serve.rows import named
from rmjax.tasks.reasoning import Reasoning
from rmjax.types import Params, Task

Ids = Sequence[int] | np.ndarray  # one flat list of whole numbers
CURE = "restore it from a copy, or load saved streams into another store"


def of_items(task: Task) -> Reasoning:
    """Returns the task if it can serve live streams.

    Args:
      task: any task. Streams must hold item ids; queries must be about items or kinds.

    Returns:
      The same task.

    Raises:
      ValueError: the task reads or asks something else.
    """
    if (
        not isinstance(task, Reasoning)
        or task.answers.questions.query == "words"
        or task.table is None
    ):
        raise ValueError(
            "live streams hold item ids and are asked about items or kinds: this model reads "
            "something else. Take a model of clicks (configs/xlong.py) or of configs/synthetic.py"
        )
    return task


def plain_users(users: Sequence[User]) -> list[User]:
    """Checks users, and turns NumPy's scalars into Python's.

    Args:
      users: of a request.

    Returns:
      The users.

    Raises:
      ValueError: a user is neither str, bytes nor an int of 64 bits, or is too long.
    """
    if isinstance(users, str | bytes):
        raise ValueError(f"users={users!r} is one user: give a list, as [{users!r}]")
    plain = [user.item() if isinstance(user, np.generic) else user for user in users]
    for user in plain:
        check_user(user)
    return plain


def pairs(users: Sequence[User], lists: Sequence[Ids], name: str) -> list[tuple[User, Ids]]:
    """Pairs each user with a list of ids.

    Args:
      users: n users.
      lists: n lists.
      name: of the lists, for the error.

    Returns:
      n pairs.

    Raises:
      ValueError: the two lengths differ, or as `plain_users`.
    """
    plain = plain_users(users)
    if len(plain) != len(lists):
        raise ValueError(
            f"{len(plain)} users, but {len(lists)} lists of {name}: give one list for each user"
        )
    return list(zip(plain, lists, strict=True))


def checked_ids(user: User, ids: Ids, below: int, name: str) -> np.ndarray:
    """Checks the ids of a user.

    Args:
      user: whose ids, for the error.
      ids: one flat list of whole numbers.
      below: number of possible ids.
      name: 'item' or 'query', for the error.

    Returns:
      The ids, i32 [n].

    Raises:
      ValueError: they are no flat list of whole numbers in 0 .. below - 1.
    """
    names = {"item": "items", "query": "queries"}[name]
    flat = f"user {user!r}: {names} must be one flat list"
    try:
        array = np.asarray(ids)
    except ValueError as error:  # nested lists of different lengths
        raise ValueError(f"{flat} of whole numbers") from error
    if array.ndim > 1:
        raise ValueError(f"{flat}, got shape {array.shape}")
    if array.ndim == 0:
        raise ValueError(f"{flat}, got {ids!r}: give [{ids!r}]")
    if array.size and array.dtype.kind not in "iu":
        cure = ""
        if array.dtype.kind in "OSU" and name == "item":
            cure = ", the index of an item: model.write and model.recommend take ids of the data"
        raise ValueError(
            f"user {user!r}: each {name} must be a whole number, got {array.dtype}{cure}"
        )
    wrong = array[(array < 0) | (array >= below)]
    if wrong.size:
        raise ValueError(
            f"user {user!r}: {name} {wrong[0]} is outside the model's range 0 .. {below - 1}"
        )
    return array.astype(np.int32)


def check_rows(rows: Params, users: Sequence[User], below: Mapping[str, int], what: str) -> None:
    """Raises ValueError if a row cannot be a stream; names the user and the array.

    Args:
      rows: arrays [n, ...] on the host.
      users: [n] users.
      below: {name of an array: its values are below this number}.
      what: the beginning of the error.
    """
    for name, leaf in named(rows):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            wrong, least = ~np.isfinite(leaf), ""
        elif leaf.dtype == bool:
            continue
        else:
            most = below.get(name, np.iinfo(leaf.dtype).max)
            wrong, least = (leaf < 0) | (leaf >= most), f", outside 0 .. {most - 1}"
        if wrong.any():
            place = tuple(np.argwhere(wrong)[0])
            raise ValueError(f"{what}: user {users[place[0]]!r}: {name} holds {leaf[place]}{least}")


def listed_users(about: Any, path: str | Path) -> list[User]:
    """Returns the users that a file lists; bytes are written as {"bytes": hexadecimal digits}.

    Args:
      about: the content of the file.
      path: of the file, for errors.

    Returns:
      The users.

    Raises:
      ValueError: they are no list of different users; names the file and the place.
    """
    users = about.get("users")
    if not isinstance(users, list):
        raise ValueError(f"{path}: users is missing or is not a list: {CURE}")
    known: dict[User, None] = {}
    for place, entry in enumerate(users):
        try:
            coded = isinstance(entry, dict) and list(entry) == ["bytes"]
            user = bytes.fromhex(entry["bytes"]) if coded else entry
            check_user(user)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: users[{place}]: {error}") from error
        if user in known:
            raise ValueError(f"{path}: users[{place}] is {user!r}, who is listed twice: {CURE}")
        known[user] = None
    return list(known)


def listed_times(about: Any, path: str | Path, count: int) -> list[float]:
    """Returns the times of the last writes that a file lists.

    Saves of earlier versions list none; their streams get the present time.

    Args:
      about: the content of the file.
      path: of the file, for errors.
      count: number of users.

    Returns:
      `count` times, unix seconds.

    Raises:
      ValueError: they are no list of so many numbers.
    """
    times = about.get("written", [time.time()] * count)
    numbers = isinstance(times, list) and all(type(t) in (int, float) for t in times)
    if not numbers or len(times) != count:
        raise ValueError(f"{path}: written is no list of {count} numbers: {CURE}")
    return [float(t) for t in times]


def in_json(users: Sequence[User]) -> list[str | int | dict[str, str]]:
    """Inverts `listed_users`."""
    return [{"bytes": user.hex()} if isinstance(user, bytes) else user for user in users]
