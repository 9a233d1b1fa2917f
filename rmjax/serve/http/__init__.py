"""The HTTP service over live streams: `python -m rmjax.serve`, or `make_app` in another server.

    service = Service(model, model.streams(store="streams.lmdb"))
    app = make_app(service, token="...")
    service.compile()

`app` is an ASGI app.
"""

try:
    from rmjax.serve.http.app import make_app
    from rmjax.serve.http.service import Limits, Service
except ModuleNotFoundError as missing:
    if str(missing.name).partition(".")[0] not in (
        "lmdb", "msgspec", "prometheus_client", "starlette", "uvicorn",
    ):  # fmt: skip
        raise
    cure = "pip install 'rmjax[serve]'"
    text = f"the service needs {missing.name}: {cure}"
    raise ModuleNotFoundError(text, name=missing.name) from missing

__all__ = ["Limits", "Service", "make_app"]
