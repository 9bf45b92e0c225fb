"""The command line: `dpo-ray …`. Errors end as one paragraph and an exit code, never as a bare traceback."""

from __future__ import annotations

import logging
import os
import sys

import typer

from pipelines import STAGES
from pipelines.commands import before, files, jobs, output, runs, watch
from pipelines.completion import mend_words
from pipelines.last_words import last_words, wanted_traceback

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Align language models from preference data on a Ray cluster.",
)
app.command()(runs.run)
for _stage in STAGES:
    app.command(name=_stage)(runs.train if _stage == "train" else runs.stage_command(_stage))
app.command()(runs.sweep)
app.command()(runs.iterate)

app.command()(files.schema)
app.command()(files.init)
app.command("import-config")(files.import_config)

app.command()(before.doctor)
app.command()(before.plan)
app.command()(before.data)

app.command()(jobs.submit)
_job = typer.Typer(no_args_is_help=True, help="Watch or end a job that was submitted.")
_job.command()(jobs.status)
_job.command()(jobs.logs)
_job.command()(jobs.cancel)
app.add_typer(_job, name="job")

app.command()(output.show)
app.command()(watch.watch)
app.command()(output.lineage)
app.command()(output.promote)
app.command()(output.rollback)
app.command()(output.gc)


_TALKATIVE = ("torchao", "torch.utils._pytree")
"""Loggers that, when transformers imports torchao, warn of what it has for GPUs and of its own calls."""


def main() -> None:
    """Entry point of the console script."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # our progress lines, in place of every library's bars
    for library in _TALKATIVE:
        logging.getLogger(library).setLevel(logging.ERROR)
    mend_words(os.environ)
    try:
        app()
    except Exception as error:
        text, code = last_words(error)
        typer.echo(f"{wanted_traceback(error)}\n{text}", err=True)
        sys.exit(code)


if __name__ == "__main__":
    main()
