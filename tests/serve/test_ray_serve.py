"""The router of the example for Ray sends each user to one shard; a stand-in takes Ray's place."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from starlette.requests import Request

from rmjax.serve.shards import shard_of
from tests import ROOT

pytest.importorskip("httpx")
SHARDS = 3
NAMES = [f"user-{k}" for k in range(20)]
ANN, BOB, CY = (next(n for n in NAMES if shard_of(n, SHARDS) == k) for k in range(SHARDS))
QUOTED = {f"{name}/ä?": f"{name}%2F%C3%A4%3F" for name in NAMES}  # in a path
SLASH = next(a for a, b in QUOTED.items() if shard_of(a, SHARDS) == 1 != shard_of(b, SHARDS))
NUMBER = next(k for k in range(-9, 0) if shard_of(k, SHARDS) == 2 != shard_of(str(k), SHARDS))


@pytest.fixture(scope="module")
def example():
    """The module of the example, where `serve.deployment` leaves classes as they are."""
    serve = SimpleNamespace(deployment=lambda **_: lambda kind: kind, Application=object)
    spec = importlib.util.spec_from_file_location("ray_serve", ROOT / "examples" / "ray_serve.py")
    module = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, {"ray": SimpleNamespace(serve=serve)}):
        spec.loader.exec_module(module)
    return module


def routed(example, method, path, fields=None, reply=lambda shard, body: (200, {})):
    """Sends a request; returns {shard: what it got}, and the status and the body of the reply."""
    got = {}

    def shard(k):
        async def remote(method, path, headers, body):
            got[k] = json.loads(body) if body else path
            assert headers == {"host": "localhost"}
            status, content = reply(k, got[k])
            return status, {"content-length": "1"}, json.dumps(content).encode()

        return SimpleNamespace(call=SimpleNamespace(remote=remote))

    async def receive():
        return {
            "type": "http.request",
            "body": b"" if fields is None else json.dumps(fields).encode(),
        }

    raw, _, query = path.partition("?")
    scope = {"type": "http", "method": method, "path": raw, "raw_path": raw.encode()}
    scope |= {"query_string": query.encode(), "headers": [(b"host", b"localhost"), (b"x", b"y")]}
    router = example.Router(*map(shard, range(SHARDS)))
    answer = asyncio.run(router(Request(scope, receive)))
    assert answer.headers["content-length"] == str(len(answer.body))
    return got, answer.status_code, json.loads(answer.body)


@pytest.mark.parametrize("path, shard", [
    (f"/v1/users/{BOB}", 1),
    (f"/v1/users/{QUOTED[SLASH]}/memory?type=str", 1),
    (f"/v1/users/{NUMBER}?type=int", 2),
    (f"/v1/users/{NUMBER}", shard_of(str(NUMBER), SHARDS)),
    (f"/v1/users/{BOB}?type=int", 0),
    ("/v1/items?query=a", 0),
])  # fmt: skip
def test_a_path_goes_to_the_shard_of_its_user(example, path, shard):
    sent = path if "?" in path else f"{path}?"
    assert routed(example, "GET", path) == ({shard: sent}, 200, {})


def test_each_shard_gets_its_part_and_the_reply_has_the_order_of_the_request(example):
    users = [CY, ANN, NUMBER, BOB, CY]
    fields = {"users": users, "items": [[1], [2], [3], [], [5]], "k": 7}
    reply = lambda shard, part: (200, {"lengths": part["items"], "unknown": 10**shard})
    got, status, merged = routed(example, "POST", "/v1/write", fields, reply)
    assert got == {
        0: {"users": [ANN], "items": [[2]], "k": 7},
        1: {"users": [BOB], "items": [[]], "k": 7},
        2: {"users": [CY, NUMBER, CY], "items": [[1], [3], [5]], "k": 7},
    }
    assert (status, merged) == (200, {"lengths": fields["items"], "unknown": 111})


def test_the_error_of_one_shard_is_the_reply(example):
    reply = lambda shard, part: (409, {"error": "x"}) if shard == 1 else (200, {"lengths": [1]})
    fields = {"users": [ANN, BOB], "items": [[], []]}
    assert routed(example, "POST", "/v1/write", fields, reply)[1:] == (409, {"error": "x"})


@pytest.mark.parametrize("fields", [
    [], "copies", 3, None, {}, {"users": []}, {"users": None}, {"users": [[]]}, {"copies": [BOB]},
    {"users": [BOB, True]}, {"users": [BOB, CY], "items": [[]]}, {"user": BOB, "copies": 3},
])  # fmt: skip
def test_shard_0_refuses_what_has_the_wrong_form(example, fields):
    reply = lambda shard, part: (400, {"error": "x"})
    got, status, _ = routed(example, "POST", "/v1/write", fields, reply)
    assert status == 400 and list(got) == [0] and (not fields or got[0] == fields)


def test_copies_stay_in_the_shard_of_their_user(example):
    other = next(n for n in NAMES if n != BOB and shard_of(n, SHARDS) == 1)
    fields = {"user": BOB, "copies": [other]}
    assert routed(example, "POST", "/v1/fork", fields) == ({1: fields}, 200, {})
    got, status, refusal = routed(example, "POST", "/v1/fork", fields | {"copies": [other, CY]})
    assert (got, status, refusal["field"]) == ({}, 400, "copies")
    assert f"user '{CY}' belongs to another shard" in refusal["error"]
