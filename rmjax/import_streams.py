"""The command `python -m rmjax.import_streams`, see `rmjax.serve.old_files`."""

if __name__ == "__main__":
    from rmjax.run.workdir import leave_when_asked

    leave_when_asked()  # before the imports, which take seconds, so that signals count

    from rmjax.serve.old_files import cli

    cli()
