"""A small model behind HTTP, for tests; as a program: a server of this model.

python -m tests.serve.served --port=0 --store=...  # flags of `python -m rmjax.serve`
"""

from __future__ import annotations

import functools
import json
import os
import time
from unittest.mock import patch

import numpy as np

from rmjax.data.source import Description
from rmjax.machines import make
from rmjax.serve import Model
from rmjax.serve.http import Limits
from tests.runs import tiny
from tests.small import ITEMS, SLOTS, noise, recommendation

IDS = tuple(f"SKU-{(7 * k) % ITEMS:02d}" for k in range(ITEMS))
SHAPES = dict(batches=(4,), segments=(1,), queries=(3,))
LIMITS = Limits(body=2000, users=4, items=20, seconds=2)
LOCAL = "http://127.0.0.1"
USUAL = {200, 400, 401, 404, 405, 408, 409, 413, 415, 421}  # statuses of faults of clients


@functools.cache
def model() -> Model:
    task = recommendation(make("rehearsal", ITEMS, **SLOTS))
    description = Description(num_items=ITEMS, max_items=20, num_queries=2, numbering=IDS)
    seed = int(os.environ.get("MODEL_SEED", "0"))  # another seed makes another model
    return Model(tiny(), task, noise(task.init, seed), description)


BODIES = {
    "/v1/write": {"users": ["ann", 7], "items": [[IDS[3], IDS[9]], []], "expected_lengths": None},
    "/v1/answer": {"users": ["ann", 7], "queries": [[IDS[3]], [IDS[4], IDS[5]]]},
    "/v1/recommend": {"users": ["ann"], "k": 3, "exclude": [[IDS[3]]]},
    "/v1/fork": {"user": "ann", "copies": ["bob", 8]},
    "/v1/reset": {"users": ["bob"]},
}
PATHS = ["/v1/users/ann?type=str", "/v1/users/7/memory?type=int", "/v1/items?query=a&limit=3"]
PIECES = (
    b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"-1", b"0.5", b"true", b"null", b"{}", b"[]",
    b'""', b"[" * 1500, b'"\\ud800"', b'"\xff"', b"\x00", b'"' + b"a" * 600 + b'"', b",",
    b'"users":', b"}", b"%", b"%ff", b"/", b"?", b"&type=int", b"\xc3\xa4", b"..", b"{user}",
)  # fmt: skip
HEADERS = (
    ("content-type", "text/plain"), ("content-length", "99999999"),
    ("authorization", "Bearer \xe4"), ("host", "evil.com"), ("accept", "\xff"),
    ("x", "y" * 3000), ("content-type", ""),
)  # fmt: skip


def mutated(rng: np.random.Generator) -> tuple[str, bytes, dict[str, bytes], bytes]:
    """Draws a request with one to three faults: method, path, headers, body."""
    path = str(rng.choice([*BODIES, *PATHS]))
    method, body = ("POST", json.dumps(BODIES[path])) if path in BODIES else ("GET", "")
    parts, headers = [path.encode(), body.encode()], {"content-type": b"application/json"}
    for _ in range(rng.integers(1, 4)):
        match rng.integers(0, 8):
            case 0:
                name, value = HEADERS[rng.integers(len(HEADERS))]
                headers[name] = value.encode("latin-1")
            case 1:
                method = str(rng.choice(["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"]))
            case kind:
                which = int(kind > 3)
                text = parts[which]
                a, b = np.sort(rng.integers(0, len(text) + 1, 2))
                piece = PIECES[rng.integers(len(PIECES))]
                end = b if kind in (2, 5) else a  # in the place of a part, or between two
                parts[which] = text[:a] + (b"" if kind == 6 else piece) + text[end:]
    return method, parts[0], headers, parts[1]


if __name__ == "__main__":
    from rmjax.serve import command
    from rmjax.serve.http import server

    open_streams, serve = Model.streams, server.serve

    def small(self, **options):
        return open_streams(self, **SHAPES, **options)

    def opened(_):
        time.sleep(float(os.environ.get("SECONDS_TO_OPEN", "0")))
        return model()

    def served(*given):
        time.sleep(float(os.environ.get("SECONDS_TO_SERVE", "0")))
        serve(*given)

    with (
        patch.object(command, "open_model", opened),
        patch.object(Model, "streams", small),
        patch.object(server, "serve", served),
    ):
        command.cli()
