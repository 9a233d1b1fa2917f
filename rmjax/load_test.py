"""The command `python -m rmjax.load_test`, see `rmjax.serve.load_test`."""

if __name__ == "__main__":
    from rmjax.run.workdir import leave_when_asked

    leave_when_asked()  # before the imports, which take seconds, so that signals count

    from rmjax.serve.load_test import cli

    cli()
