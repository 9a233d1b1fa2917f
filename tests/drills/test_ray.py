"""Two shards in Ray Serve: users stay where they are, and answers equal those of one store."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from unittest.mock import patch

import numpy as np
import pytest

import rmjax
from rmjax.run import training
from rmjax.serve.client import Client, ServiceError
from rmjax.serve.database import open_readonly
from rmjax.serve.shards import shard_of
from tests import ROOT
from tests.runs import PLAIN, tiny
from tests.serve import process

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")
pytestmark = pytest.mark.slow
USERS = ["ann", "7", 7, -1, 2**63 - 1, "ümlaut/ä?", *range(100, 112)]


@contextlib.contextmanager
def running(workdir, stores):
    """Starts a cluster on this machine with the example; gives a client."""
    folders = [str(ROOT), str(ROOT / "examples")]
    variables = process.compiled(workdir.parent / "compiled")
    variables |= {"PYTHONPATH": ":".join(folders), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    sys.path.insert(0, folders[1])
    from ray_serve import build

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"env_vars": variables}
    with patch.dict(os.environ, RAY_AUTH_MODE="disabled"):  # no token goes to the home folder
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=options)
    try:
        serve.start(http_options={"port": port})
        serve.run(build({"workdir": str(workdir), "stores": str(stores), "shards": "2"}))
        yield Client(f"http://127.0.0.1:{port}")
    finally:
        serve.shutdown()
        ray.shutdown()
        sys.path.remove(folders[1])


def test_users_stay_with_their_shard_and_answers_are_those_of_one_store(tmp_path):
    workdir = tmp_path / "run"
    short = {"train.steps": 1, "train.eval_every": 1, "train.save_every": 1}
    training.train(tiny(**PLAIN | short), workdir)
    model, rng = rmjax.open_model(workdir), np.random.default_rng(0)
    one, items = model.streams(), model.description.num_items

    def same(client):
        query = [rng.integers(0, items, 3).tolist() for _ in USERS]
        for answer, alike in zip(
            client.answer(USERS, query), one.answer(USERS, query), strict=True
        ):
            np.testing.assert_allclose(answer, alike, rtol=1e-4, atol=1e-5)

    for _ in range(2):  # the second time the cluster starts again with the same databases
        with running(workdir, tmp_path) as client:
            for _ in range(3):
                more = [rng.integers(0, items, rng.integers(0, 20)).tolist() for _ in USERS]
                assert client.write(USERS, more) == one.write(USERS, more)
                same(client)
            for user in USERS:
                assert client.length(user) == one.info(user).length
            for shard in range(2):
                with contextlib.closing(open_readonly(tmp_path / f"{shard}-of-2.lmdb")) as database:
                    mine = {user for user in USERS if shard_of(user, 2) == shard}
                    assert mine and {*database.users()} == mine
            for users, status in ([[], 400], [[True], 400], [["ann", 7, 1.5], 400]):
                with pytest.raises(ServiceError) as caught:
                    # past the client's own check, which refuses such users
                    client._post("write", {"users": users, "items": [[] for _ in users]})
                assert caught.value.status == status
            other = next(k for k in range(50) if shard_of(k, 2) != shard_of("ann", 2))
            with pytest.raises(ServiceError, match=f"user {other} belongs to another shard"):
                client.fork("ann", [other])
    assert len(one) == len(USERS)
