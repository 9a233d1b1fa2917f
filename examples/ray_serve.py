"""Serves a trained model from several processes or machines, with Ray Serve.

    pip install 'rmjax[serve]' 'ray[serve]' httpx
    cd examples && serve run ray_serve:build workdir=$PWD/../runs/xlong stores=/data shards=4

Each shard is a deployment with one replica and a database of its own, such as /data/2-of-4.lmdb.
A router sends each user to the shard of `rmjax.serve.shards.shard_of`. Its endpoints are those of
`python -m rmjax.serve`, also the page at /. If RMJAX_TOKEN is set, clients must send it.

A database is on the disk of one machine. On several machines, start each node with the shards that
it holds, `ray start --resources='{"shard-0": 1, "shard-1": 1}'`, and add pinned=1 to the command.
A request of users in several shards is one request to each of these shards. If one of them refuses
its part, its error is the reply, but other shards have done theirs: `expected_lengths` makes it
safe to send the request again.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

import httpx
from msgspec.json import encode
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

import rmjax
from rmjax.serve.client import plain_token
from rmjax.serve.http import Service, make_app
from rmjax.serve.http.bodies import Refused
from rmjax.serve.shards import shard_of

_HEADERS = ("authorization", "content-type", "host")
_USERS = "/v1/users/"


@serve.deployment(num_replicas=1, max_ongoing_requests=1024)
class Shard:
    """The service of some users, without a port of its own.

    Args:
      workdir: of a trained model.
      store: the database of these users.
      token: see `make_app`.
    """

    def __init__(self, workdir: str, store: str, token: str | None):
        model = rmjax.open_model(workdir)
        self._streams = model.streams(store=store, capacity=16_384)
        service = Service(model, self._streams)
        service.compile()
        app = httpx.ASGITransport(make_app(service, token))
        self._client = httpx.AsyncClient(transport=app, base_url="http://localhost")

    async def call(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """Returns the status, the headers and the body of the reply to a request."""
        reply = await self._client.request(method, path, headers=headers, content=body)
        return reply.status_code, dict(reply.headers), reply.content

    def __del__(self) -> None:
        self._streams.close()


@serve.deployment(max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0})
class Router:
    """Sends each user of a request to the shard of this user.

    Args:
      *shards: handles of the deployments, in order.
    """

    def __init__(self, *shards: Any):
        self._shards = shards

    async def __call__(self, request: Request) -> Response:
        """Serves a request of HTTP."""
        body = await request.body()
        raw = request.scope["raw_path"].decode()  # a slash in a name is %2F
        path = f"{raw}?{request.url.query}"
        headers = {name: request.headers[name] for name in _HEADERS if name in request.headers}
        try:
            parts = self._parts(request, raw, body)
        except Refused as refused:
            return Response(encode(refused.reply), refused.status, media_type="application/json")
        except (KeyError, TypeError, ValueError, RecursionError):
            parts = {0: ((), body)}  # shard 0 says what is wrong
        calls = [
            self._shards[shard].call.remote(request.method, path, headers, part)
            for shard, (_, part) in parts.items()
        ]
        replies = await asyncio.gather(*calls)
        status, of_reply, content = next((one for one in replies if one[0] >= 400), replies[0])
        if status < 400 and len(replies) > 1:
            places = [places for places, _ in parts.values()]
            merged = _merged([json.loads(content) for *_, content in replies], places)
            of_reply, content = {"content-type": "application/json"}, json.dumps(merged).encode()
        of_reply.pop("content-length", None)
        return Response(content, status, of_reply)

    def _parts(self, request: Request, raw: str, body: bytes) -> dict[int, tuple[list[int], bytes]]:
        """For each shard the places of its users in the request, and its part of the body."""
        count = len(self._shards)
        if request.method == "GET":
            name = unquote(raw.removeprefix(_USERS).split("/")[0])
            user = int(name) if request.query_params.get("type") == "int" else name
            return {shard_of(user, count) if raw.startswith(_USERS) else 0: ([], body)}
        fields = json.loads(body)
        if "copies" in fields:
            users = fields["user"], *fields["copies"]
            shard, *others = (shard_of(user, count) for user in users)
            for user, other in zip(users[1:], others, strict=True):
                if other != shard:
                    cure = "choose another name, or write the items of its history"
                    raise Refused(400, f"user {user!r} belongs to another shard: {cure}", "copies")
            return {shard: ([], body)}
        places = defaultdict(list)
        for place, user in enumerate(fields["users"]):
            places[shard_of(user, count)].append(place)
        lists = [values for values in fields.values() if isinstance(values, list)]
        if not places or any(len(values) != len(fields["users"]) for values in lists):
            raise ValueError("each list has one entry for each user")
        return {shard: (mine, _part(fields, mine)) for shard, mine in places.items()}


def _part(fields: Mapping[str, Any], places: list[int]) -> bytes:
    """The body of a request for some of its users."""
    pick = lambda value: [value[k] for k in places] if isinstance(value, list) else value
    return json.dumps({name: pick(value) for name, value in fields.items()}).encode()


def _merged(replies: list[dict[str, Any]], places: list[list[int]]) -> dict[str, Any]:
    """One reply: lists in the order of the request, and the sums of counts."""
    merged: dict[str, Any] = {}
    for name, first in replies[0].items():
        if isinstance(first, list):
            pairs = zip(places, replies, strict=True)
            rows = {k: row for mine, one in pairs for k, row in zip(mine, one[name], strict=True)}
            merged[name] = [rows[k] for k in sorted(rows)]
        else:
            merged[name] = sum(one[name] for one in replies)
    return merged


def build(arguments: Mapping[str, str]) -> serve.Application:
    """Makes the application of `serve run`.

    Args:
      arguments: 'workdir' of a trained model; 'stores', the folder of the databases; 'shards', how
        many; 'pinned', whether shard i must be on a node with the resource 'shard-i'.

    Returns:
      The application.
    """
    count, token = int(arguments["shards"]), plain_token()
    shards = []
    for k in range(count):
        pin = {"resources": {f"shard-{k}": 1}} if arguments.get("pinned") else {}
        shard = Shard.options(name=f"shard-{k}", ray_actor_options=pin)
        store = f"{arguments['stores']}/{k}-of-{count}.lmdb"
        shards.append(shard.bind(arguments["workdir"], store, token))
    return Router.bind(*shards)
