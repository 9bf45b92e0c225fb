"""Commands about configuration files: what may stand in one."""

from __future__ import annotations

from typing import Annotated

import typer


def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/configuration.md instead.")] = False,
) -> None:
    """Print the JSON Schema of a configuration, by which an editor completes and checks it."""
    from dpo_ray.config.described import page
    from dpo_ray.config.schema import config_schema, written_schema

    typer.echo(page(config_schema()) if markdown else written_schema(), nl=False)
