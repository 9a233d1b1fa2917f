"""The endpoints as an ASGI app: paths, tokens, status codes and the OpenAPI schema."""

from __future__ import annotations

import asyncio
import functools
import hmac
import importlib.resources
import ipaddress
import re
import secrets
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

import msgspec
import prometheus_client
from absl import logging
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

import rmjax
from rmjax.serve.http import bodies
from rmjax.serve.http.bodies import Error, Refused
from rmjax.serve.http.metrics import Metrics
from rmjax.serve.http.service import Limits, Service
from rmjax.serve.store import Damaged, QueueFull, WrongLength

_JSON, _HTML = "application/json", "text/html; charset=utf-8"
_USERS = "/v1/users/"
_PAGE_HEADERS = {  # the page is one file: it loads nothing, and sends to this server alone
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src "
    "'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}
_encode = msgspec.json.Encoder().encode
Act = Callable[..., Awaitable[Response]]


class Endpoint(NamedTuple):
    """A row of the table of endpoints.

    Attributes:
      method: GET or POST.
      path: with names of parameters in braces.
      form: of the query of a GET request, of the body of a POST request.
      reply: of status 200.
      act: the method of `Service`; it takes the form, and the parameters of the path.
    """

    method: str
    path: str
    form: type[bodies.Request]
    reply: type
    act: Callable[..., Awaitable[Any]]


INFO = Endpoint("GET", _USERS + "{user}", bodies.OfUser, bodies.Info, Service.info)
MEMORY = Endpoint("GET", _USERS + "{user}/memory", bodies.OfUser, bodies.Memory, Service.memory)
ENDPOINTS = (
    Endpoint("POST", "/v1/write", bodies.Write, bodies.Written, Service.write),
    Endpoint("POST", "/v1/answer", bodies.Ask, bodies.Answered, Service.answer),
    Endpoint("POST", "/v1/recommend", bodies.Recommend, bodies.Recommendations, Service.recommend),
    Endpoint("POST", "/v1/fork", bodies.Fork, bodies.Done, Service.fork),
    Endpoint("POST", "/v1/reset", bodies.Reset, bodies.Done, Service.reset),
    Endpoint("GET", "/v1/items", bodies.Search, bodies.Items, Service.items),
    INFO,
    MEMORY,
)


def make_app(service: Service, token: str | None = None) -> Starlette:
    """Makes the ASGI app of a service.

    Args:
      service: of one model and its streams. Until `service.compile` has returned, requests get 503.
      token: clients must send it as 'Authorization: Bearer <token>'. None: none is needed, but the
        header Host must name this machine by a local address. So a page of another host cannot
        reach the service through a browser on this machine.

    Returns:
      The app. `app.state.service` is the service.
    """
    metrics = Metrics(service)
    check = functools.partial(_check_sender, token=token.encode() if token else None)
    handler = functools.partial(_handler, metrics)

    def endpoint(one: Endpoint) -> Act:
        async def act(request: Request, *names: str) -> Response:
            check(request)
            _check_state(service)
            form = await _form(request, one, service.limits)
            return _reply(await one.act(service, form, *names))

        return handler(one.path, act)

    info, memory = endpoint(INFO), endpoint(MEMORY)

    async def user(request: Request) -> Response:
        name, last = _split(request)
        return await (memory if last else info)(request, name)

    routes = [
        Route(one.path, endpoint(one), methods=[one.method])
        for one in ENDPOINTS
        if one not in (INFO, MEMORY)
    ]
    routes += [Route(_USERS + "{user:path}", user, methods=["GET"])]
    others = _plain(service, metrics, check)
    routes += [Route(path, handler(path, act)) for path, act in others.items()]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _nowhere(metrics)})
    app.router.redirect_slashes = False
    app.state.service = service
    return app


def _plain(service: Service, metrics: Metrics, check: Callable[[Request], None]) -> dict[str, Act]:
    """The paths that are no endpoints of streams, and what they do."""

    async def health(request: Request) -> Response:
        return _reply(bodies.Status("alive"))

    async def readiness(request: Request) -> Response:
        _check_state(service)
        return _reply(bodies.Status("ready"))

    async def numbers(request: Request) -> Response:
        check(request)
        _check_state(service)  # until then the database waits for the compiler
        text = await service.in_thread(metrics.text)  # it asks the database
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    schema, page_file = _encode(openapi()), importlib.resources.files(rmjax) / "serve/page.html"
    page_text = page_file.read_bytes()

    async def described(request: Request) -> Response:
        return Response(schema, media_type=_JSON)

    async def page(request: Request) -> Response:
        return Response(page_text, headers=_PAGE_HEADERS, media_type=_HTML)

    return {
        "/healthz": health,
        "/readyz": readiness,
        "/metrics": numbers,
        "/openapi.json": described,
        "/": page,
    }


def _nowhere(metrics: Metrics) -> Callable[[Request, Exception], Awaitable[Response]]:
    """The reply of a path or a method that does not exist."""

    async def nowhere(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # of the router
        paths = ", ".join(one.path for one in ENDPOINTS)
        cure = f"the paths are {paths}; /openapi.json describes them"
        refused = Refused(error.status_code, f"{error.detail}: {cure}")
        metrics.count("other", error.status_code, 0.0)
        return _refusal(refused, "other", error.headers)

    return nowhere


def openapi() -> dict[str, Any]:
    """The OpenAPI schema of `ENDPOINTS`."""
    types = [kind for one in ENDPOINTS for kind in (one.form, one.reply)]
    place = "#/components/schemas/{name}"
    refs, forms = msgspec.json.schema_components([*types, Error], ref_template=place)
    queries = {one.form.__name__ for one in ENDPOINTS if one.method == "GET"}
    components = {name: form for name, form in forms.items() if name not in queries}
    of_error = {"description": _summary(Error), "content": {_JSON: {"schema": refs[-1]}}}
    paths: dict[str, Any] = {}
    for one, form, reply in zip(ENDPOINTS, refs[:-1:2], refs[1:-1:2], strict=True):
        ok = {"description": _summary(one.reply), "content": {_JSON: {"schema": reply}}}
        operation: dict[str, Any] = {
            "operationId": one.act.__name__,
            "summary": _summary(one.act),
            "responses": {"200": ok, "default": of_error},
            "security": [{"token": []}, {}],
        }
        if one.method == "POST":
            body = {"required": True, "content": {_JSON: {"schema": form}}}
            operation["requestBody"] = body
        else:
            fields = forms[one.form.__name__]["properties"]
            operation["parameters"] = [
                {"name": name, "in": "query", "schema": field} for name, field in fields.items()
            ]
            if "{user}" in one.path:
                text = {"type": "string"}
                user = {"name": "user", "in": "path", "required": True, "schema": text}
                operation["parameters"].append(user)
        paths[one.path] = {one.method.lower(): operation}
    schemes = {"token": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "rmjax: live memories of many users", "version": rmjax.__version__},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": schemes},
    }


def _summary(one: Any) -> str:
    return str(one.__doc__).partition("\n")[0]


def _handler(metrics: Metrics, path: str, act: Act) -> Act:
    """The handler of a path: it counts requests, and turns errors into replies."""

    async def handler(request: Request, *names: str) -> Response:
        begin = time.perf_counter()
        try:
            response = await act(request, *names)
        except Exception as error:  # every request gets a reply; unknown errors are logged
            response = _refusal(error, path)
        metrics.count(path, response.status_code, time.perf_counter() - begin)
        return response

    return handler


def _reply(reply: Any) -> Response:
    return Response(_encode(reply), media_type=_JSON)


def _refusal(error: Exception, path: str, headers: Any = None) -> Response:
    """The reply to a request that failed."""
    headers = dict(headers or {})
    match error:
        case Refused():
            status, reply = error.status, error.reply
        case ClientDisconnect():  # nobody reads this reply
            status, reply = 499, Error("the client left")
        case QueueFull():
            status, reply = 429, Error(str(error))
        case WrongLength():
            user: Any = error.user
            status, reply = 409, Error(str(error), "expected_lengths", user, error.actual)
        case Damaged():
            logging.error("%s: %s", path, error)
            user = error.user
            cure = "reset this user, or restore the database from a copy"
            status, reply = 500, Error(f"the stream of {user!r} is damaged: {cure}", user=user)
        case ValueError() if _is_refusal(error):
            status, reply = 400, Error(str(error))
        case _:
            name, by_disk = secrets.token_hex(8), isinstance(error, OSError)
            trace = None if by_disk else error  # errors of the disk say all in words
            logging.error("%s: request %s failed: %s", path, name, error, exc_info=trace)
            cause = "the streams cannot be written" if by_disk else "the request failed"
            status = 503 if by_disk else 500
            reply = Error(f"{cause}: the log of the server says why, under this id", id=name)
    if status in (429, 503):
        headers["retry-after"] = "1"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status in (408, 413):  # a part of the body may still come
        headers["connection"] = "close"
    return Response(_encode(reply), status, headers, _JSON)


def _is_refusal(error: ValueError) -> bool:
    """Whether the store refused a request; other code raises ValueError for a fault of its own."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and frames[-1][0].f_globals["__name__"].startswith("rmjax.serve.")


def _check_state(service: Service) -> None:
    if service.closing:
        raise Refused(503, "the server shuts down: send the request again later")
    if not service.ready:
        raise Refused(503, "the model is being compiled: send the request again later")


def _check_sender(request: Request, token: bytes | None) -> None:
    """Raises Refused unless the request has the token, or needs none."""
    if token is None:
        host = request.headers.get("host", "")
        if not _is_local(host):
            cure = "start the server with RMJAX_TOKEN to serve other hosts"
            raise Refused(421, f"this server is localhost, not {host!r:.50}: {cure}")
        return
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(sent.encode("latin-1"), token):
        raise Refused(401, "the token is missing or wrong: send 'Authorization: Bearer <token>'")


def _is_local(host: str) -> bool:
    """Whether a header Host is localhost or an address of this machine alone."""
    name = re.sub(r":[0-9]*$", "", host) if not host.endswith("]") else host
    try:
        return name == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _split(request: Request) -> tuple[str, bool]:
    """The user in a path, where a slash in a name is %2F; and whether /memory follows."""
    raw: bytes = request.scope.get("raw_path") or request.scope["path"].encode()
    name, *last = raw.partition(b"?")[0].removeprefix(_USERS.encode()).split(b"/")
    if last not in ([], [b"memory"]):
        raise HTTPException(404)
    try:
        return unquote_to_bytes(name).decode(), bool(last)
    except UnicodeDecodeError:
        raise HTTPException(400, "the path is not UTF-8") from None


async def _form(request: Request, one: Endpoint, limits: Limits) -> bodies.Request:
    """The checked fields of a request."""
    if one.method == "GET":
        pairs = request.query_params.multi_items()
        return bodies.checked(bodies.once(pairs), one.form, strict=False)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _JSON:
        # Also keeps pages of other hosts out: browsers ask before they send this type.
        raise Refused(415, f"the body must be JSON: send the header 'Content-Type: {_JSON}'")
    return bodies.decoded(await _body(request, limits), one.form)


async def _body(request: Request, limits: Limits) -> bytes:
    """The body of a request.

    Raises:
      Refused: it is too large, or does not come in time.
    """
    cause = f"the body has more than {limits.body:,} bytes: send less in a request"
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limits.body:
        raise Refused(413, cause)
    chunks, size = [], 0
    try:
        async with asyncio.timeout(limits.seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.body:
                    raise Refused(413, cause)
                chunks.append(chunk)
    except TimeoutError:
        raise Refused(408, f"the body took more than {limits.seconds:g} seconds") from None
    return b"".join(chunks)
