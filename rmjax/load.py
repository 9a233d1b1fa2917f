"""The old name of the command `python -m rmjax.load_test`."""

from rmjax._moved import forward

__getattr__ = forward(
    __name__, {"load_test": "rmjax.serve.load_test:run_test", "*": "rmjax.serve.load_test"}
)

if __name__ == "__main__":
    import warnings

    from rmjax.run.workdir import leave_when_asked

    leave_when_asked()
    warnings.warn(
        "python -m rmjax.load is now python -m rmjax.load_test", DeprecationWarning, stacklevel=1
    )

    from rmjax.serve.load_test import cli

    cli()
