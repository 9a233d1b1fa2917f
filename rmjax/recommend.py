"""The command `python -m rmjax.recommend`, see `rmjax.serve.recommend_all`."""

if __name__ == "__main__":
    from rmjax.run.workdir import leave_when_asked

    leave_when_asked()  # before the imports, which take seconds, so that signals count

    from rmjax.serve.recommend_all import cli

    cli()
