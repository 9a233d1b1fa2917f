"""The calls of `Streams` over HTTP: a client of the service `python -m rmjax.serve`.

    client = Client("http://127.0.0.1:8000")
    client.write(["ann", "bob"], [[3, 14, 15], [9]])  # returns the lengths of the two streams
    client.answer(["ann"], [[26, 5]])

Only the standard library is used, since its connections cost the least time of the processor.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import threading
import urllib.parse
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from rmjax.serve.store import User

Ids = Sequence[int] | np.ndarray


class Client:
    """Calls a service; any thread may call. Each thread has a connection of its own.

    Args:
      url: of the service, such as http://127.0.0.1:8000.
      token: the bearer token; None: the environment variable RMJAX_TOKEN, if it is set.
      timeout: most seconds that a call waits for the service.

    Raises:
      ValueError: the URL names no host, or the token has characters that a header cannot have.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 60.0):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no address of a service, such as http://127.0.0.1:8000")
        secure = parts.scheme == "https"
        self._kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._url, self._address = url, (parts.hostname, parts.port)
        self._prefix, self._timeout = parts.path.rstrip("/"), timeout
        token = plain_token(token)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._local = threading.local()

    def write(
        self,
        users: Sequence[User],
        items: Sequence[Ids],
        expected_lengths: Sequence[int | None] | None = None,
    ) -> list[int]:
        """Appends items to streams, as `Streams.write`.

        Args:
          users: [n] users.
          items: n lists of items, in the ids that the service takes.
          expected_lengths: [n] lengths before the call; None: any.

        Returns:
          The n lengths of the streams after the call.

        Raises:
          ServiceError: the service refused or failed, see its `status`.
          OSError: the service cannot be reached, or does not answer in time.
        """
        body = {"users": _plain_users(users), "items": list(map(_plain, items))}
        if expected_lengths is not None:
            body["expected_lengths"] = list(expected_lengths)
        lengths: list[int] = self._post("write", body)["lengths"]
        return lengths

    def answer(self, users: Sequence[User], queries: Sequence[Ids]) -> list[np.ndarray]:
        """Answers queries, as `Streams.answer`.

        Args:
          users: [n] users.
          queries: n lists of queries, in the ids that the service takes.

        Returns:
          n arrays, f32 [Q, ...].

        Raises:
          ServiceError: the service refused or failed, see its `status`.
          OSError: the service cannot be reached, or does not answer in time.
        """
        body = {"users": _plain_users(users), "queries": list(map(_plain, queries))}
        return [np.asarray(scores, np.float32) for scores in self._post("answer", body)["answers"]]

    def recommend(
        self, users: Sequence[User], k: int = 10, exclude: Sequence[Ids] | None = None
    ) -> tuple[list[list[int | str]], list[np.ndarray]]:
        """Recommends the best next items, of a model that ranks items.

        Args:
          users: [n] users.
          k: how many items.
          exclude: n lists of items that are left out, in the ids of the service; None: none.

        Returns:
          n lists of at most k items, the best one first, and n arrays f32 of their scores.

        Raises:
          ServiceError: the service refused or failed, see its `status`.
          OSError: the service cannot be reached, or does not answer in time.
        """
        body: dict[str, Any] = {"users": _plain_users(users), "k": int(k)}
        if exclude is not None:
            body["exclude"] = list(map(_plain, exclude))
        best = self._post("recommend", body)
        return best["items"], [np.asarray(scores, np.float32) for scores in best["scores"]]

    def memory(self, user: User) -> dict[str, np.ndarray]:
        """Returns the arrays f32 of a user's memory by their names, such as 'slots'.

        Args:
          user: any user; without a stream, the memory is the empty one.

        Raises:
          ServiceError: the service refused or failed, see its `status`.
          OSError: the service cannot be reached, or does not answer in time.
        """
        memory = json.loads(self._call("GET", _address(user, "/memory")))
        leaves = memory["leaves"] if memory["slots"] is None else {"slots": memory["slots"]}
        return {name: np.asarray(leaf, np.float32) for name, leaf in leaves.items()}

    def fork(self, user: User, copies: Sequence[User]) -> None:
        """Gives new users copies of a user's stream, as `Streams.fork`.

        Args:
          user: a user that has a stream.
          copies: new users, as many as the service takes in a request.

        Raises:
          ServiceError: the service refused or failed, see its `status`.
          OSError: the service cannot be reached, or does not answer in time.
        """
        (plain,) = _plain_users([user])
        self._post("fork", {"user": plain, "copies": _plain_users(copies)})

    def reset(self, users: Sequence[User]) -> None:
        """Forgets users, as `Streams.reset`.

        Args:
          users: that have a stream.

        Raises:
          ServiceError: the service refused or failed, see its `status`.
          OSError: the service cannot be reached, or does not answer in time.
        """
        self._post("reset", {"users": _plain_users(users)})

    def length(self, user: User) -> int | None:
        """Returns the number of items of a user's stream; None: the user has no stream.

        Args:
          user: any user.

        Raises:
          ServiceError: the service refused or failed, see its `status`.
          OSError: the service cannot be reached, or does not answer in time.
        """
        try:
            about = self._call("GET", _address(user))
        except ServiceError as error:
            if error.status == 404:
                return None
            raise
        return int(json.loads(about)["length"])

    def __contains__(self, user: object) -> bool:
        """Whether a user has a stream."""
        plain = int(user) if isinstance(user, np.integer) else user
        return isinstance(plain, str | int) and self.length(plain) is not None

    def ready(self) -> bool:
        """Whether the service has compiled its programs.

        Raises:
          OSError: the service cannot be reached, or does not answer in time.
        """
        try:
            self._call("GET", "/readyz")
        except ServiceError as error:
            if error.status == 503:
                return False
            raise
        return True

    def metric(self, name: str) -> float:
        """Returns a number of the service's /metrics.

        Args:
          name: such as process_cpu_seconds_total.

        Returns:
          The number; NaN if the service has no metric of this name.

        Raises:
          ServiceError: the service refused or failed, see its `status`.
          OSError: the service cannot be reached, or does not answer in time.
        """
        for line in self._call("GET", "/metrics").decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[1])
        return float("nan")

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        data = json.dumps(body, separators=(",", ":")).encode()
        answer: dict[str, Any] = json.loads(self._call("POST", f"/v1/{path}", data))
        if answer.get("unknown"):
            warnings.warn(f"{path}: the model does not know {answer['unknown']} ids", stacklevel=3)
        return answer

    def _call(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """Sends one request on this thread's connection; returns the body of the answer."""
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._kind(*self._address, timeout=self._timeout)
            self._local.connection = connection
        if connection.sock and select.select([connection.sock], [], [], 0)[0]:
            connection.close()  # the service has closed it; `request` opens it again
        headers = self._headers | ({"Content-Type": "application/json"} if body else {})
        try:
            connection.request(method, self._prefix + path, body, headers)
            answer = connection.getresponse()
            data: bytes = answer.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()  # the next call opens it again
            kind = type(error).__name__
            raise OSError(
                f"{self._url}{path} gave no answer ({kind}: {error}): is the service running? "
                "python -m rmjax.serve starts one"
            ) from error
        if answer.status >= 400:
            _refuse(answer.status, f"{self._url}{path}", data)
        return data


class ServiceError(RuntimeError):
    """The service refused a request, or failed.

    Attributes:
      status: of HTTP: 400 wrong request, 401 wrong token, 409 other length, 413 too large, 429 too
        many requests, 503 not ready or closing.
      body: what the service answered: the decoded JSON, or its text.
    """

    def __init__(self, status: int, url: str, body: Any):
        super().__init__(f"{url} answered {status}: {body}")
        self.status, self.body = status, body


def plain_token(token: str | None = None) -> str | None:
    """A token without white space around it, as servers and clients use it.

    Args:
      token: the token; None: RMJAX_TOKEN in the environment.

    Returns:
      The token; None: there is none.

    Raises:
      ValueError: a header cannot have its characters; the error does not show the token.
    """
    plain = (os.environ.get("RMJAX_TOKEN", "") if token is None else token).strip()
    if not (plain.isascii() and plain.isprintable()) or " " in plain:
        raise ValueError("RMJAX_TOKEN has spaces or characters outside of ASCII: choose another")
    return plain or None


def _refuse(status: int, url: str, data: bytes) -> NoReturn:
    try:
        body = json.loads(data)
    except ValueError:
        body = data.decode(errors="replace")[:1000]
    raise ServiceError(status, url, body)


def _plain(ids: Ids) -> list[Any]:
    return ids.tolist() if isinstance(ids, np.ndarray) else list(ids)


def _plain_users(users: Sequence[User]) -> list[str | int]:
    """Users as JSON has them."""
    for user in users:
        if isinstance(user, bool) or not isinstance(user, str | int | np.integer):
            raise ValueError(f"user {user!r}: a service takes strings and integers")
    return [user if isinstance(user, str) else int(user) for user in users]


def _address(user: User, part: str = "") -> str:
    """The path of a user."""
    (plain,) = _plain_users([user])
    kind = "" if isinstance(plain, str) else "?type=int"
    return f"/v1/users/{urllib.parse.quote(str(plain), safe='')}{part}{kind}"
