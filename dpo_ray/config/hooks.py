"""The section `run.hooks`: who is told when a run has ended."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from dpo_ray.config.section import Section


class Hook(Section):
    """A command, a webhook, or both. They get what happened as JSON (pipelines/hooks.py)."""

    command: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(None, min_length=1)
    """A program and its arguments, run without a shell where the run was started, with the JSON on standard input."""
    url_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable that holds the URL of a webhook, to which the JSON is posted. A webhook's URL mostly is a
    secret, so it stands in no configuration."""
    timeout_seconds: float = Field(10.0, gt=0.0)
    """How long the command, or one request, may take."""
    max_retries: int = Field(3, ge=0, le=10)
    """How often a request is sent again that failed, or was answered with 429 or 5xx: after pauses that grow."""

    @model_validator(mode="after")
    def _of_something(self) -> Hook:
        if self.command is None and self.url_env is None:
            raise ValueError("names neither a `command` nor a `url_env`: give one of them, or leave the hook out")
        if self.url_env is None and self.changed("max_retries"):
            raise ValueError("max_retries is of requests to a webhook, and there is no `url_env`: leave it out")
        return self


class Hooks(Section):
    """Who is told of which end of a run."""

    on_success: Hook | None = None
    """After a run that ended with exit code 0, one without anything new included."""
    on_gate_failed: Hook | None = None
    """After a run whose model did not pass the gate (exit code 4)."""
    on_error: Hook | None = None
    """After a run that failed otherwise; not after Ctrl-C, nor where another run was at it (exit codes 130, 75)."""
