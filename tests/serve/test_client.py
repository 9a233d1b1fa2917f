"""A client makes the calls of a store over HTTP; the load test calls a service through it."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading

import numpy as np
import pytest
import uvicorn

from rmjax.serve import load_test, traffic
from rmjax.serve.client import Client, ServiceError, plain_token
from rmjax.serve.http import Service, make_app, server
from rmjax.serve.traffic import Names
from tests.serve.served import IDS, SHAPES, model

LEAF = {"age": [1.0, 2.0]}  # of a memory without slots


@pytest.fixture(scope="module")
def url():
    """The address of a service in a thread of this process."""
    with (
        contextlib.closing(model().streams(**SHAPES)) as streams,
        contextlib.closing(server.bound("127.0.0.1", 0, None)) as opened,
    ):
        service = Service(model(), streams)
        service.compile()
        config = uvicorn.Config(make_app(service), lifespan="off", log_config=None)
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [opened]})
        thread.start()
        yield server.url(opened)
        running.should_exit = True
        thread.join()


def test_the_calls_of_a_store(url):
    client, store = Client(url), model().streams(**SHAPES)
    assert client.ready()
    users, items = ["ann/b%", 7, "7"], [[3, 14, 15], [9], []]
    assert client.write(users, [[IDS[i] for i in ids] for ids in items]) == [3, 1, 0]
    store.write(users, items)
    queries = [np.array([2, 6]), np.array([5]), np.array([5])]
    answers = client.answer(users, [np.array(IDS, object)[query] for query in queries])
    for got, expected in zip(answers, store.answer(users, queries), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)
    assert client.length("ann/b%") == 3 and client.length(7) == 1 and client.length("7") == 0
    client.fork("ann/b%", ["copy", 8])
    assert client.length("copy") == 3 and 8 in client and "8" not in client
    np.testing.assert_allclose(client.memory(7)["slots"], store.memory(7).slots, atol=1e-6)
    client.reset(["copy"])
    assert client.length("copy") is None
    assert client.metric("rmjax_users") == 4 and np.isnan(client.metric("no_such"))


def test_users_and_ids_as_the_client_has_them(url):
    client = Client(url)
    users = np.array([70, 71])
    assert client.write(users, [[IDS[3]], []], [0, None]) == [1, 0]
    assert np.int64(70) in client and client.length(np.int64(70)) == 1
    for wrong in (b"ann", 1.5, True):
        with pytest.raises(ValueError, match="a service takes strings and integers"):
            client.write([wrong], [[]])
    with pytest.warns(UserWarning, match="write: the model does not know 2 ids"):
        assert client.write([70], [["no", IDS[1], "such"]]) == [2]
    with pytest.raises(ServiceError, match="cannot recommend items"):
        client.recommend([70], 3, [[IDS[3]]])


def test_a_recommendation_has_the_form_of_the_service():
    client, posted = Client("http://127.0.0.1:1"), []
    client._post = lambda *sent: posted.append(sent) or {"items": [["b"]], "scores": [[0.5]]}
    items, scores = client.recommend(["ann"], np.int64(1), [np.array([3])])
    assert items == [["b"]] and scores[0].dtype == np.float32 and scores[0].tolist() == [0.5]
    body = '{"users": ["ann"], "k": 1, "exclude": [[3]]}'
    assert [(path, json.dumps(sent)) for path, sent in posted] == [("recommend", body)]


def test_a_token_is_stripped_and_never_shown(monkeypatch):
    monkeypatch.setenv("RMJAX_TOKEN", " s3cret\n")
    assert plain_token() == "s3cret" and plain_token("other\n") == "other"
    assert Client("http://host")._headers == {"Authorization": "Bearer s3cret"}
    assert plain_token(" ") is None
    for wrong in ("s3\ncret", "s3 cret", "s3cr\u00e9t"):
        with pytest.raises(ValueError, match="RMJAX_TOKEN has spaces") as caught:
            Client("http://host", wrong)
        assert "s3" not in str(caught.value)


def test_refusals_and_lost_connections(url):
    client = Client(url)
    client.write(["bob"], [[IDS[3]]])
    with pytest.raises(ServiceError, match="/v1/write answered 409: .*has 1 items") as caught:
        client.write(["bob"], [[IDS[4]]], [0])
    assert caught.value.status == 409 and caught.value.body["actual"] == 1
    assert client.write(["bob"], [[IDS[4]]], [1]) == [2]
    with pytest.raises(ServiceError, match="answered 400"):
        client.write(["bob"], [])
    with contextlib.closing(server.bound("127.0.0.1", 0, None)) as nobody:
        closed = Client(server.url(nobody))
    with pytest.raises(OSError, match="/v1/answer gave no answer .ConnectionRefused"):
        closed.answer(["bob"], [[IDS[3]]])
    for wrong in ("127.0.0.1:8000", "ftp://host", "http://"):
        with pytest.raises(ValueError, match="is no address of a service"):
            Client(wrong)


def test_a_client_connects_again_after_a_lost_connection():
    """Each connection gets one reply. The first one stays open, the others end without a word."""
    replies = [b"no HTTP\r\n"]
    for status, body in (
        (200, {"lengths": [1]}),
        (503, {}),
        (200, {"slots": None, "leaves": LEAF}),
    ):
        text = json.dumps(body).encode()
        replies += [b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n%s" % (status, len(text), text)]
    lines = []

    def serve():
        for reply in replies:
            connection, _ = opened.accept()
            data = b""
            while not data.endswith(b"}" if data.startswith(b"POST") else b"\r\n\r\n"):
                data += connection.recv(10_000)
            lines.append(data.partition(b" HTTP")[0].decode())
            connection.sendall(reply)
            if reply != replies[0]:
                connection.close()

    def closed() -> bool:
        return bool(select.select([client._local.connection.sock], [], [], 10)[0])

    with socket.create_server(("127.0.0.1", 0)) as opened:
        client = Client(f"http://127.0.0.1:{opened.getsockname()[1]}/prefix/", timeout=10)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with pytest.raises(OSError, match="gave no answer .BadStatusLine"):
            client.length("ann")
        assert client.write(["ann"], [[3]]) == [1] and closed()
        assert not client.ready() and closed()
        assert client.memory("ann")["age"].tolist() == LEAF["age"]
        thread.join(10)
    assert lines == [
        "GET /prefix/v1/users/ann",
        "POST /prefix/v1/write",
        "GET /prefix/readyz",
        "GET /prefix/v1/users/ann/memory",
    ]


def test_a_load_test_from_processes(url):
    wanted = traffic.requests(rate=200, seconds=0.5, users=10, items=len(IDS))
    names, how = Names(30, np.array(IDS, object)), (model().task, model().params, wanted, 10)
    result = load_test.measure_service(*how, names, url, clients=2, threads=3)
    assert result["errors"] == {} and result["largest_difference"] < 1e-5
    assert 0 < result["all_ms"]["p50"] <= result["all_ms"]["p100"] < 60_000
    assert result["cores"]["clients"] > 0 and result["cores"]["service"] > 0
