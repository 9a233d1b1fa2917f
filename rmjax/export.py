"""The command `python -m rmjax.export`, see `rmjax.serve.export`."""

from rmjax._moved import forward

__getattr__ = forward(__name__, {"write_export": "rmjax.serve.export"})

if __name__ == "__main__":
    from rmjax.run.workdir import leave_when_asked

    leave_when_asked()  # before the imports, which take seconds, so that signals count

    from rmjax.serve.export import cli

    cli()
