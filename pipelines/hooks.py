"""Who is told when a run has ended: a command of the user's, or a webhook. What goes wrong there is said, and changes
nothing of how the run ended.

Both get the same JSON: `event` (success, gate_failed or error), `text` (all of it in one line), `name`, `run_id`,
`output`, `folder` (the run's, where summary.json is), `exit_code`, `error` (its type) and `reasons`; and of
summary.json `published`, `nothing_new`, `input`, `accuracy`, `win_rate` and `cost`. What is not known is null.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from dpo_ray.config import Config, Hook
from dpo_ray.errors import Busy, ConfigError, DpoRayError, GateFailed, Interrupted
from dpo_ray.progress import say

Event = Literal["success", "gate_failed", "error"]
_STAGE = "hooks"
_AGAIN = (429, 500, 502, 503, 504)
_PAUSE_S = 60  # at most between two requests
_KEPT = 64 << 10  # bytes of what a command printed, its end, that go to the log


@dataclass
class Ended:
    """What is known of a run when it has ended."""

    folder: str | None = None
    """The run's; None where it ended before it had one."""
    summary: dict[str, Any] = field(default_factory=dict)


def require_hooks(config: Config) -> None:
    """Raises ConfigError where a hook could not be called: before the run, and not after its hours."""
    for name, hook in _hooks(config).items():
        if hook.url_env is not None and not os.environ.get(hook.url_env):
            raise ConfigError(
                f"run.hooks.{name}.url_env is {hook.url_env}, and there is no such environment variable here: set it "
                "to the webhook's URL where the run is started (a job takes it in its runtime_env), or leave it out."
            )
        if hook.url_env is not None and not _is_url(os.environ[hook.url_env]):
            raise ConfigError(
                f"run.hooks.{name}.url_env is {hook.url_env}, and what this environment variable holds is no URL that "
                "begins with https:// or http:// and names a server: set it to the webhook's URL, without quotes."
            )
        if hook.command is not None and shutil.which(hook.command[0]) is None:
            raise ConfigError(
                f"run.hooks.{name}.command begins with {hook.command[0]}, and there is no such program here: give its "
                "path, or put it on PATH; and see that it may be executed."
            )


@contextmanager
def told_when_ended(config: Config) -> Iterator[Ended]:
    """Call the hook that fits how the block ends; the block fills in what it knows."""
    ended = Ended()
    try:
        yield ended
    except (Busy, Interrupted, KeyboardInterrupt):
        raise
    except BaseException as error:
        _call(config, "gate_failed" if isinstance(error, GateFailed) else "error", ended, error)
        raise
    _call(config, "success", ended, None)


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in {"http", "https"} and bool(parts.hostname)


def _hooks(config: Config) -> dict[str, Hook]:
    return {name: hook for name, hook in config.run.hooks if hook is not None}


def _call(config: Config, event: Event, ended: Ended, error: BaseException | None) -> None:
    name = f"on_{event}"
    hook = _hooks(config).get(name)
    if hook is None:
        return
    content = json.dumps(_told(config, event, ended, error), ensure_ascii=False).encode()
    for what, call in (("command", _run), ("url_env", _post)):
        if getattr(hook, what) is None:
            continue
        # Whatever goes wrong: the run has ended as it has.
        try:
            failure = call(hook, content)
        except Exception as wrong:
            failure = type(wrong).__name__  # its message may hold the URL
        said = f"failed: {failure}. The run ended as it did without it" if failure is not None else "done"
        say(_STAGE, f"run.hooks.{name}.{what} {said}")


def _told(config: Config, event: Event, ended: Ended, error: BaseException | None) -> dict[str, Any]:
    summary = ended.summary
    evaluation = summary.get("eval") or {}
    exit_code = error.exit_code if isinstance(error, DpoRayError) else int(error is not None)
    reasons = [str(error)] if error is not None else []
    return {
        "event": event,
        "text": f"{config.run.name}: {_text(event, summary, reasons)}",
        "name": config.run.name,
        "run_id": summary.get("run_id"),
        "output": config.run.output,
        "folder": ended.folder,
        "exit_code": exit_code,
        "error": type(error).__name__ if error is not None else None,
        "reasons": reasons,
        **{key: summary.get(key) for key in ("published", "nothing_new", "input", "cost")},
        **{key: evaluation.get(key) for key in ("accuracy", "win_rate")},
    }


def _text(event: Event, summary: dict[str, Any], reasons: list[str]) -> str:
    match event:
        case "success" if summary.get("nothing_new"):
            return f"nothing new, {summary['nothing_new']['version']} stands"
        case "success" if summary.get("published"):
            return f"published {summary['published']}"
        case "success":
            return "done"
    return " ".join(["not published:" if event == "gate_failed" else "failed:", *reasons])


def _run(hook: Hook, content: bytes) -> str | None:
    """What went wrong with the command. What it prints is in the log file."""
    assert hook.command is not None
    # A file and no pipe: one that the command leaves running may hold it open, and what it prints may be much.
    with tempfile.TemporaryFile() as printed:
        try:
            process = subprocess.Popen(
                hook.command, stdin=subprocess.PIPE, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return f"{hook.command[0]} could not be started ({error.strerror})"
        with process:
            try:
                process.communicate(content, timeout=hook.timeout_seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # what it has started itself, too
                return f"it took more than timeout_seconds={hook.timeout_seconds:g} and was ended"
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        size = printed.seek(0, os.SEEK_END)
        printed.seek(max(0, size - _KEPT))
        left_out = f"[{size - _KEPT} bytes before this are left out]\n" if size > _KEPT else ""
        sys.stderr.write(left_out + printed.read().decode(errors="replace"))
    return f"exit code {process.returncode}; what it said is in the log" if process.returncode else None


def _post(hook: Hook, content: bytes) -> str | None:
    """What went wrong with the webhook, without its URL, which the libraries' own words would hold."""
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    assert hook.url_env is not None
    retry = Retry(
        total=hook.max_retries,
        backoff_factor=1,
        backoff_max=_PAUSE_S,
        respect_retry_after_header=False,  # a server may ask for hours
        status_forcelist=_AGAIN,
        allowed_methods=None,
        raise_on_status=False,
    )
    with requests.Session() as session, _without_words_of("urllib3"):
        for scheme in ("https://", "http://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        try:
            answer = session.post(
                os.environ[hook.url_env],
                data=content,
                headers={"Content-Type": "application/json"},
                timeout=hook.timeout_seconds,
                allow_redirects=False,
                stream=True,  # its code is the answer: a body may take for ever, a byte now and then
            )
        except requests.RequestException as error:
            return f"{type(error).__name__}, in {hook.max_retries + 1} tries"
    if 200 <= answer.status_code < 300:
        return None
    return f"answered {answer.status_code}" + (
        f", in {hook.max_retries + 1} tries" if answer.status_code in _AGAIN else ""
    )


@contextmanager
def _without_words_of(library: str) -> Iterator[None]:
    """It logs each retry with the path of the URL, which is the secret part of it."""
    loggers = [logging.getLogger(name) for name in (library, *logging.root.manager.loggerDict) if _is_of(name, library)]
    before = [(logger, logger.disabled) for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, was in before:
            logger.disabled = was


def _is_of(name: str, library: str) -> bool:
    return name == library or name.startswith(f"{library}.")
