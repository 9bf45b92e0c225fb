"""Ray's token authentication, as this process will take part in it: whether it is on, and where the token is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dpo_ray.errors import ConfigError

WAY_IN = (
    "Of a cluster that asks for a token (`ray get-auth-token` tells it on its head), put the token into "
    "~/.ray/auth_token, readable by you alone, or name its file by RAY_AUTH_TOKEN_PATH, and set RAY_AUTH_MODE=token."
)


@dataclass(frozen=True)
class Token:
    """Where Ray finds a token, in its own order of looking."""

    place: str
    readable_by_others: bool = False


def mode(environ: Mapping[str, str] = os.environ) -> str:
    """What RAY_AUTH_MODE says; disabled where it says nothing, for Ray then offers no token to a cluster."""
    return environ.get("RAY_AUTH_MODE", "disabled").lower()


def find_token(environ: Mapping[str, str] = os.environ) -> Token | None:
    """None where there is none. Raises ConfigError where RAY_AUTH_TOKEN_PATH names no readable file."""
    if environ.get("RAY_AUTH_TOKEN"):
        return Token("RAY_AUTH_TOKEN")
    named = environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path(environ.get("HOME", "~")).expanduser() / ".ray" / "auth_token"
    try:
        empty = not path.read_text().strip()
        others = bool(path.stat().st_mode & 0o077)
    except OSError as error:
        if named:
            raise ConfigError(
                f"RAY_AUTH_TOKEN_PATH is {named}, which cannot be read ({error.strerror}). {WAY_IN}"
            ) from error
        return None
    if not empty:
        return Token(str(path), others)
    if named:
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH is {named}, an empty file. {WAY_IN}")
    return None


def what_is_sent() -> str:
    """By this process to a cluster, in words."""
    token = find_token()
    if mode() != "token":
        return f"this process sends none (RAY_AUTH_MODE is {mode()})"
    return f"this process sends that of {token.place}, which may be another one" if token else "there is none here"
