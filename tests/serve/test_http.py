"""The HTTP service: replies are those of the store, and every fault is named."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from unittest.mock import AsyncMock, Mock, patch

import jsonschema
import numpy as np
import pytest
from starlette.testclient import TestClient

from rmjax import tasks
from rmjax.serve import Damaged, Model
from rmjax.serve.http import Service, make_app, server
from rmjax.serve.http.app import ENDPOINTS, openapi
from rmjax.serve.http.bodies import Refused, Write, decoded
from tests import ROOT
from tests.runs import tiny
from tests.serve import served
from tests.serve.served import IDS, ITEMS, LIMITS, LOCAL
from tests.shop import Shop, ShopSource
from tests.small import noise

SCHEMA = openapi()
USED = set()  # (method, path) of the requests whose bodies and replies were checked


@pytest.fixture(scope="module")
def service():
    with contextlib.closing(served.model().streams(**served.SHAPES, queue=8)) as streams:
        made = Service(served.model(), streams, LIMITS)
        made.compile()
        yield made


@pytest.fixture(scope="module")
def client(service):
    with TestClient(make_app(service), LOCAL) as made:
        yield made


def fits(value, schema) -> None:
    """Raises unless a value is as the OpenAPI schema says."""
    jsonschema.Draft202012Validator(schema | {"components": SCHEMA["components"]}).validate(value)


def checked(reply, path: str, status: int, body=None):
    """The content of a reply, whose status and form are checked."""
    assert reply.status_code == status, reply.text
    method = reply.request.method.lower()
    operation = SCHEMA["paths"][path][method]
    response = operation["responses"].get(str(status)) or operation["responses"]["default"]
    content = reply.json()
    fits(content, response["content"]["application/json"]["schema"])
    if status == 200:
        if body is not None:
            fits(body, operation["requestBody"]["content"]["application/json"]["schema"])
        USED.add((method, path))
    return content


def post(client, name: str, body, status: int = 200):
    path = f"/v1/{name}"
    return checked(client.post(path, json=body), path, status, body)


def get(client, place: str, path: str, status: int = 200, **query):
    return checked(client.get(place, params=query), path, status)


def test_answers_over_http_are_those_of_the_store(client, service):
    history = [IDS[k] for k in (3, 14, 15, 9, 2, 6)]
    reply = post(client, "write", {"users": ["ann", 7], "items": [history, [IDS[9]]]})
    assert reply == {"lengths": [6, 1], "unknown": 0}
    body = {"users": [7, "ann", "new"], "queries": [[IDS[5]], [IDS[3], IDS[26]], []]}
    reply = post(client, "answer", body)
    expected = service.streams.answer([7, "ann", "new"], [[5], [3, 26], []])
    assert reply["unknown"] == 0 and reply["answers"][2] == []
    for row, alike in zip(reply["answers"], expected, strict=True):
        np.testing.assert_array_equal(np.float32(row), alike)


def test_unknown_items_are_left_out_counted_and_answered_with_null(client, service):
    body = {"users": ["una", "una"], "items": [[IDS[1], "SKU-99", IDS[2]], [5]]}
    assert post(client, "write", body) == {"lengths": [2, 2], "unknown": 2}
    body = {"users": ["una"], "queries": [["SKU-99", IDS[3], 3, IDS[4]]]}
    reply = post(client, "answer", body)
    (row,) = service.streams.answer(["una"], [[3, 4]])
    assert reply["unknown"] == 2 and reply["answers"][0][::2] == [None, None]
    np.testing.assert_array_equal(np.float32(reply["answers"][0][1::2]), row)


def test_a_retried_write_is_not_applied_twice(client):
    body = {"users": ["rita"], "items": [[IDS[1]]], "expected_lengths": [0]}
    assert post(client, "write", body)["lengths"] == [1]
    reply = post(client, "write", body, 409)
    assert reply["actual"] == 1 and reply["user"] == "rita" and reply["error"]
    assert reply["field"] == "expected_lengths"
    assert post(client, "write", body | {"expected_lengths": [None]})["lengths"] == [2]


def test_copied_and_forgotten_users(client, service):
    post(client, "write", {"users": ["eve"], "items": [[IDS[1], IDS[2]]]})
    assert post(client, "fork", {"user": "eve", "copies": ["adam", 12]}) == {"users": 2}
    info = get(client, "/v1/users/12", "/v1/users/{user}", type="int")
    assert info["user"] == 12 and info["length"] == 2 and 0 <= info["age"] < 60 < info["bytes"]
    assert "actual" not in post(client, "fork", {"user": "eve", "copies": [12]}, 400)
    assert "nobody" in post(client, "fork", {"user": "nobody", "copies": ["x"]}, 400)["error"]
    assert post(client, "reset", {"users": ["eve"]}) == {"users": 1}
    assert "'eve'" in get(client, "/v1/users/eve", "/v1/users/{user}", 404)["error"]
    assert "'eve'" in post(client, "reset", {"users": ["eve"]}, 400)["error"]


def test_the_memory_of_a_user_is_the_one_of_the_store(client, service):
    post(client, "write", {"users": ["mem"], "items": [[IDS[1]] * 5]})
    reply = get(client, "/v1/users/mem/memory", "/v1/users/{user}/memory")
    np.testing.assert_array_equal(np.float32(reply["slots"]), service.streams.memory("mem").slots)
    assert reply["leaves"] == {} and len(reply["slots"]) == 4


def test_names_of_users_in_paths(client):
    """A number is another user than its digits, and names may have any characters."""
    users = {"7": "7", "a%2Fb": "a/b", "a%2Fmemory": "a/memory", "%C3%A4%20%3F%25": "ä ?%"}
    post(client, "write", {"users": [7], "items": [[IDS[1]] * 3]})
    post(client, "write", {"users": [*users.values()], "items": [[IDS[1]]] * 4})
    for shown, user in users.items():
        info = get(client, f"/v1/users/{shown}", "/v1/users/{user}")
        assert (info["user"], info["length"]) == (user, 1)
        get(client, f"/v1/users/{shown}/memory", "/v1/users/{user}/memory")
    for wrong in ("07", "+7", "7.0", "1e3", "seven", "9223372036854775808", "9" * 5000, "%D9%A7"):
        get(client, f"/v1/users/{wrong}", "/v1/users/{user}", 400, type="int")
    assert client.get("/v1/users/%FF").status_code == 400
    assert client.get("/v1/users/ann/other").status_code == 404
    assert "type" in get(client, "/v1/users/7", "/v1/users/{user}", 400, type="float")["error"]
    assert "typ" in get(client, "/v1/users/7", "/v1/users/{user}", 400, typ="int")["error"]
    assert client.get("/v1/users/7?type=int&type=str").status_code == 400


def test_the_catalogue_is_searched(client):
    reply = get(client, "/v1/items", "/v1/items", query="sku-1", limit=3)
    expected = [one for one in IDS if "SKU-1" in one][:3]
    assert reply == {"items": expected, "total": ITEMS, "ranks": False, "queries": True}
    assert get(client, "/v1/items", "/v1/items")["items"] == list(IDS)
    assert "limit" in get(client, "/v1/items", "/v1/items", 400, limit="0")["field"]


def test_recommendations_are_those_of_the_model(client):
    reply = post(client, "recommend", {"users": ["ann"]}, 404)
    assert "cannot recommend items" in reply["error"]
    config = tiny(**{"machine.kind": "gru", "data.segment_length": 4})
    source = ShopSource(Shop(users=6, items=ITEMS, shortest=4, longest=17))
    description = source.describe()
    task = tasks.make_task(config, description)
    model = Model(config, task, noise(task.init), description)
    store = model.streams(**served.SHAPES)
    ranked = Service(model, store)
    ranked.compile()
    other = TestClient(make_app(ranked), LOCAL)
    history = [3, 14, 15, 9, 2]
    post(other, "write", {"users": ["ann"], "items": [history]})
    reply = post(other, "recommend", {"users": ["ann"], "k": 3, "exclude": [[15, 99]]})
    (best,) = model.recommend(store=store, users=["ann"], k=3, exclude=[[15]])
    assert reply["unknown"] == 1 and reply["items"] == [[one.item for one in best]]
    np.testing.assert_allclose(reply["scores"][0], [one.score for one in best], rtol=1e-6)
    compiled = store._programs.rank.func._cache_size()
    for k, users in ((1, 1), (17, 3), (ITEMS, 2)):
        for width in (0, 1, 5, 20):
            exclude = [list(range(width // users))] * users
            post(other, "recommend", {"users": [*range(users)], "k": k, "exclude": exclude})
    assert store._programs.rank.func._cache_size() == compiled
    assert get(other, "/v1/items", "/v1/items")["queries"] is False
    body = {"users": ["ann"], "k": ITEMS, "exclude": [list(range(2, ITEMS))]}
    assert sorted(post(other, "recommend", body)["items"][0]) == [0, 1]
    assert post(other, "recommend", {"users": ["ann"], "k": ITEMS + 1}, 400)["field"] == "k"
    (row,) = post(other, "answer", {"users": ["ann"], "queries": [[0]]})["answers"]
    np.testing.assert_array_equal(np.float32(row), store.answer(["ann"], [[0]])[0])
    assert "from 0 to 0" in post(other, "answer", {"users": ["a"], "queries": [[1]]}, 400)["error"]
    assert post(other, "answer", {"users": ["a"], "queries": [["0"]]}, 400)["field"] == "queries"
    memory = get(other, "/v1/users/ann/memory", "/v1/users/{user}/memory")
    assert memory["slots"] is None and memory["leaves"].keys() >= {"segments"}


BAD = {  # body of a write -> words of the error
    "": "the body is no JSON",
    "[]": "Expected object, got array",
    "{": "the body is no JSON",
    '"\\ud800': "the body is no JSON",
    '{"users": ["a"]}': "missing required field items",
    '{"users": ["a"], "items": [[]], "item": 3}': "unknown field item. The fields are users, items",
    '{"users": ["a"], "users": ["b"], "items": [[]]}': "'users' occurs twice",
    '{"\\ud800": 1, "\\ud800": 1}': "'\\ud800' occurs twice",
    '{"\\ud800": 1}': "ud800",
    '{"users": [], "items": []}': "users: Expected array of length >= 1",
    '{"users": "a", "items": [[]]}': "users: Expected array, got str. Users, each a string",
    '{"users": [null], "items": [[]]}': "users[0]: Expected int | str, got null",
    '{"users": [true], "items": [[]]}': "users[0]: Expected int | str, got bool",
    '{"users": ["a", 1.5], "items": [[], []]}': "users[1]: Expected int | str, got float",
    '{"users": [["a"]], "items": [[]]}': "users[0]: Expected int | str, got array",
    '{"users": [9223372036854775808], "items": [[]]}': "users[0]: Expected int <= 92233",
    '{"users": [1' + 500 * "0" + '], "items": [[]]}': "users[0]: Expected int <= 92233",
    '{"users": ["\\ud800"], "items": [[]]}': "is no Unicode text",
    '{"users": ["a"], "items": [3]}': "items[0]: Expected array, got int. For each user a list",
    '{"users": ["a"], "items": [[[3]]]}': "items[0][0]: Expected int | str, got array",
    '{"users": ["a"], "items": [[NaN]]}': "NaN is no number of JSON",
    '{"users": ["a"], "items": [[-Infinity]]}': "-Infinity is no number of JSON",
    '{"users": ["a"], "items": [[1e999]]}': "items[0][0]: Expected int | str, got float",
    '{"users": ["a"], "items": [["b"], ["c"]]}': "2 items for 1 users: give one for each user",
    '{"users": ["a"], "items": [[]], "expected_lengths": [1, 2]}': "2 expected_lengths for 1",
    '{"users": ["a"], "items": [[]], "expected_lengths": [-1]}': "expected_lengths[0]: Expected",
    '{"users": ["a"], "items": [[]], "expected_lengths": ["1"]}': "expected_lengths[0]: Expected",
    "[" * 1900: "nested too deep",
}


@pytest.mark.parametrize("body", BAD)
def test_a_bad_body_is_refused_with_its_field_and_the_cure(client, body):
    users = len(client.app.state.service.streams)
    reply = client.post("/v1/write", content=body, headers={"content-type": "application/json"})
    assert BAD[body] in checked(reply, "/v1/write", 400)["error"]
    assert len(client.app.state.service.streams) == users


def test_many_keys_are_read_in_one_pass():
    """A body of 1 MB has room for 100,000 keys, and the event loop waits while they are read."""
    keys = ",".join(f'"{k}":1' for k in [*range(50_000), 49_999]).encode()
    begin = time.monotonic()
    with pytest.raises(Refused, match="'49999' occurs twice"):
        decoded(b"{" + keys + b"}", Write)
    assert time.monotonic() - begin < 5


def test_bytes_that_are_not_utf_8_are_refused(client):
    for body in (b"\xff", '{"users": ["ä"]}'.encode("latin-1"), "{}".encode("utf-16")):
        reply = client.post("/v1/write", content=body, headers={"content-type": "application/json"})
        assert "the body is no JSON" in checked(reply, "/v1/write", 400)["error"]


def test_requests_over_a_limit_are_refused(client):
    large = json.dumps({"users": ["a"], "items": [["x" * 100] * 19]}).encode()
    assert len(large) > LIMITS.body
    reply = client.post("/v1/write", content=large, headers={"content-type": "application/json"})
    assert "more than 2,000 bytes" in checked(reply, "/v1/write", 413)["error"]
    assert reply.headers["connection"] == "close"
    reply = post(client, "write", {"users": [1, 2, 3, 4, 5], "items": [[]] * 5}, 413)
    assert "5 users: send at most 4" in reply["error"] and reply["field"] == "users"
    reply = post(client, "write", {"users": [1, 2], "items": [[1] * 11, [2] * 10]}, 413)
    assert "21 ids: send at most 20" in reply["error"] and reply["field"] == "items"
    reply = post(client, "answer", {"users": [1], "queries": [[1] * 21]}, 413)
    assert reply["field"] == "queries"
    assert post(client, "fork", {"user": 1, "copies": [2, 3, 4, 5, 6]}, 413)["field"] == "copies"
    get(client, f"/v1/users/{'x' * 600}", "/v1/users/{user}", 400)


def test_a_body_without_an_end_is_read_up_to_the_limit(client):
    """And one whose length is known to be too large is not read at all."""
    chunk = {"type": "http.request", "body": b"x" * 999, "more_body": True}
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/write", "query_string": b""}
    for more, pulled in (([], 3), ([(b"content-length", b"2001")], 0)):
        receive, send = AsyncMock(side_effect=[chunk] * 9), AsyncMock()
        asyncio.run(client.app(scope | {"headers": headers + more}, receive, send))
        assert send.await_args_list[0].args[0]["status"] == 413
        assert receive.await_count == pulled


def test_a_full_queue_is_429_and_requests_that_wait_are_served(client, service):
    gate, begun = threading.Event(), threading.Event()
    service.streams.observe(lambda count: (begun.set(), gate.wait(30)))
    body = {"users": ["queue"], "items": [[IDS[1]]]}
    threads = [threading.Thread(target=post, args=(client, "write", body)) for _ in range(9)]
    threads[0].start()
    assert begun.wait(30)
    for thread in threads[1:]:
        thread.start()
    while service.streams.waiting < 8:
        time.sleep(0.001)
    reply = client.post("/v1/write", json=body)
    gate.set()
    for thread in threads:
        thread.join()
    service.streams.observe(lambda count: None)
    assert reply.headers["retry-after"] == "1" and "again" in reply.json()["error"]
    checked(reply, "/v1/write", 429)
    assert post(client, "write", body)["lengths"] == [10]


def test_before_compilation_and_after_a_signal_requests_get_503(client, service):
    for name, value in (("ready", False), ("closing", True)):
        with patch.object(service, name, value):
            reply = client.post("/v1/answer", json={"users": [1], "queries": [[1]]})
            checked(reply, "/v1/answer", 503)
            assert reply.headers["retry-after"] == "1"
            assert client.get("/readyz").status_code == client.get("/metrics").status_code == 503
            assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}


@pytest.mark.parametrize(
    ("fault", "status"),
    [(KeyError("secret"), 500), (OSError("secret"), 503), (ValueError("secret"), 500)],
)
def test_an_unexpected_error_is_in_the_log_under_the_id_of_the_reply(
    client, service, caplog, fault, status
):
    with patch.object(service.streams, "write_soon", Mock(side_effect=fault)):
        reply = post(client, "write", {"users": ["a"], "items": [[]]}, status)
    assert reply["id"] in caplog.text and "secret" in caplog.text
    assert "secret" not in str(reply) and "Traceback" not in str(reply)


def test_a_damaged_row_is_named_and_nothing_of_it_is_served(client, service):
    future = Future()
    future.set_exception(Damaged("dan", "/secret/place"))
    with patch.object(service.streams, "answer_soon", Mock(return_value=future)):
        reply = post(client, "answer", {"users": ["ann", "dan"], "queries": [[], []]}, 500)
    assert reply.keys() == {"error", "user"} and reply["user"] == "dan"
    assert "reset this user" in reply["error"] and "secret" not in reply["error"]


def test_only_senders_with_the_token_are_served(service):
    body = {"users": ["tom"], "items": [[]]}
    client = TestClient(make_app(service, "s3cret"), "http://example.org")
    for sent in (None, "s3cret", "Basic s3cret", "Bearer s3cre", "Bearer s3crett", "Bearer \xe4"):
        headers = {} if sent is None else {"authorization": sent.encode("latin-1")}
        for reply in (
            client.post("/v1/write", json=body, headers=headers),
            client.post("/v1/write", content=b"x" * 99_999, headers=headers),
            client.get("/v1/users/tom", headers=headers),
            client.get("/metrics", headers=headers),
        ):
            assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"
            assert "Authorization: Bearer <token>" in reply.json()["error"]
    for path in ("/", "/healthz", "/readyz", "/openapi.json"):
        assert client.get(path).status_code == 200
    for sent in ("Bearer s3cret", "bearer s3cret"):
        reply = client.post("/v1/write", json=body, headers={"authorization": sent})
        assert reply.status_code == 200


def test_pages_of_other_hosts_cannot_use_a_server_without_a_token(service):
    """A browser names the host that it believes to talk to, and asks before it sends JSON."""
    client, body = TestClient(make_app(service), LOCAL), {"users": ["tom"], "items": [[]]}
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "[::1]", "127.0.1.1"):
        assert client.post("/v1/write", json=body, headers={"host": host}).status_code == 200
    for host in ("evil.com", "localhost.evil.com:8000", "", "127.0.0.1.evil.com"):
        reply = client.post("/v1/write", json=body, headers={"host": host})
        assert reply.status_code == 421 and "RMJAX_TOKEN" in reply.json()["error"]
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {"content-type": kind}
        reply = client.post("/v1/write", content=json.dumps(body), headers=headers)
        assert reply.status_code == 415 and "application/json" in reply.json()["error"]
    reply = client.get("/")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert reply.headers["content-type"].startswith("text/html")


def test_unknown_paths_and_methods_are_named(client):
    for reply, status in (
        (client.get("/v1/nothing"), 404),
        (client.post("/v1/write/"), 404),
        (client.get("/v1/write"), 405),
        (client.post("/v1/users/ann"), 405),
        (client.put("/metrics"), 405),
    ):
        assert reply.status_code == status and "/v1/recommend" in reply.json()["error"]


def test_metrics_count_requests(service):
    client = TestClient(make_app(service), LOCAL)
    post(client, "write", {"users": ["tom"], "items": [[]]})
    post(client, "write", {"users": ["tom"]}, 400)
    client.get("/v1/nothing")
    text = client.get("/metrics").text
    for line in (
        'rmjax_requests_total{endpoint="/v1/write",status="200"} 1.0',
        'rmjax_requests_total{endpoint="/v1/write",status="400"} 1.0',
        'rmjax_requests_total{endpoint="other",status="404"} 1.0',
        'rmjax_request_seconds_count{endpoint="/v1/write"} 2.0',
        f"rmjax_users {float(len(service.streams))}",
        "rmjax_queue_length 0.0",
        'rmjax_batch_requests_bucket{le="1.0"} 1.0',
        "process_resident_memory_bytes",
    ):
        assert line in text, text


def test_the_schema_describes_every_endpoint(client):
    """The tests above have checked the bodies of all of them."""
    shown = client.get("/openapi.json").json()
    assert shown == json.loads(json.dumps(SCHEMA))
    routes = {route.path for route in client.app.routes if route.path.startswith("/v1/")}
    listed = {path.replace("{user}", "{user:path}") for path in SCHEMA["paths"]}
    assert routes == {path.removesuffix("/memory") for path in listed}
    assert {(one.method.lower(), one.path) for one in ENDPOINTS} == USED
    refs = set(json.dumps(shown).split('"#/components/schemas/')[1:])
    assert {ref.partition('"')[0] for ref in refs} == shown["components"]["schemas"].keys()


@pytest.mark.parametrize("package", ["starlette.routing", "msgspec", "prometheus_client"])
def test_a_missing_package_is_named_with_the_extra(monkeypatch, package):
    for name in [name for name in sys.modules if name.startswith("rmjax.serve.http")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    words = rf"the service needs {package}: pip install 'rmjax\[serve\]'"
    with pytest.raises(ModuleNotFoundError, match=words):
        importlib.import_module("rmjax.serve.http")


def test_a_fault_at_the_start_is_one_line(tmp_path):
    line = [sys.executable, "-m", "rmjax.serve", f"--workdir={tmp_path}", "--host=0.0.0.0"]
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.perturb=0", "RMJAX_TOKEN": " "}
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "--host=0.0.0.0: other machines reach it without a token" in done.stderr


def test_a_small_cache_is_named_as_the_flag(tmp_path):
    line = [sys.executable, "-m", "tests.serve.served", "--workdir=made", "--port=0"]
    line += [f"--store={tmp_path / 'store'}", "--cache=2"]
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 1 and "--cache = 2: with a store it must be at least" in done.stderr


@pytest.mark.parametrize(
    ("host", "token", "words"),
    [
        ("0.0.0.0", None, "other machines reach it without a token: set RMJAX_TOKEN"),
        ("::", None, "other machines reach it without a token"),
        ("no.such.host.invalid", "abc", "there is no such address"),
        ("127.0.0.1", "a b", "RMJAX_TOKEN has spaces"),
        ("127.0.0.1", "ä", "RMJAX_TOKEN has spaces or characters outside of ASCII"),
    ],
)
def test_a_wrong_address_is_refused(host, token, words):
    with pytest.raises(ValueError, match=words):
        server.bound(host, 0, token)


def test_an_address_is_bound_once():
    with server.bound("0.0.0.0", 0, "abc") as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(OSError, match=f"--port={port}: Address already in use: take another"):
            server.bound("0.0.0.0", port, "abc")
    assert server.url(first := server.bound("localhost", 0, None)).startswith("http://127.0.0.1:")
    first.close()
