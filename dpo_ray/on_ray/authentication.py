"""Ray's token authentication, as this process will take part in it: whether it is on, and where the token is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dpo_ray.errors import ConfigError

MODE, TOKEN, PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
"""Environment variables: whether a token is asked for and shown, the token, and the file that it is in."""

WAY_IN = (
    "Of a cluster that asks for a token (`ray get-auth-token` tells it on its head), put the token into "
    f"~/.ray/auth_token, readable by you alone, or name its file by {PATH}, and set {MODE}=token."
)


@dataclass(frozen=True)
class Token:
    """Where Ray finds a token, in its own order of looking."""

    place: str
    readable_by_others: bool = False


def mode(environ: Mapping[str, str] = os.environ) -> str:
    """What RAY_AUTH_MODE says; disabled where it says nothing, for Ray then offers no token to a cluster."""
    return environ.get(MODE, "disabled").lower()


def described(environ: Mapping[str, str] = os.environ) -> str:
    """What this process would show a cluster, without the token itself."""
    try:
        token = find_token(environ)
        found = f"a token is in {token.place}" if token is not None else "no token is found"
    except ConfigError as error:
        found = str(error)
    return f"{MODE} is {environ.get(MODE, 'not set')}, and {found}"


def find_token(environ: Mapping[str, str] = os.environ) -> Token | None:
    """None where there is none. Raises ConfigError where RAY_AUTH_TOKEN_PATH names no readable file."""
    if environ.get(TOKEN):
        return Token(TOKEN)
    named = environ.get(PATH)
    path = Path(named) if named else Path(environ.get("HOME", "~")).expanduser() / ".ray" / "auth_token"
    try:
        empty = not path.read_text().strip()
        others = bool(path.stat().st_mode & 0o077)
    except OSError as error:
        if named:
            raise ConfigError(f"{PATH} is {named}, which cannot be read ({error.strerror}). {WAY_IN}") from error
        return None
    if not empty:
        return Token(str(path), others)
    if named:
        raise ConfigError(f"{PATH} is {named}, an empty file. {WAY_IN}")
    return None
