"""The command `python -m rmjax.reshard`, see `rmjax.serve.reshard`."""

if __name__ == "__main__":
    from rmjax.run.workdir import leave_when_asked

    leave_when_asked()  # before the imports, which take seconds, so that signals count

    from rmjax.serve.reshard import cli

    cli()
