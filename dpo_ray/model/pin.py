"""Revisions on the hub move. A run resolves each to a commit once, at its start, and all nodes keep to it."""

from __future__ import annotations

from contextlib import suppress
from typing import TypeVar

from dpo_ray.config import ImplicitReward, Judge
from dpo_ray.config.section import Section
from dpo_ray.errors import ConfigError
from dpo_ray.model.source import HubRepository, is_hub_id

_S = TypeVar("_S", bound=Section)


def pinned(section: _S) -> _S:
    """The configuration, or a part of it, with a commit as the revision of every hub id in it.

    The commit is the hub's; where that cannot be asked, that of the last download. Where there is neither, the revision
    stays as it is, and whoever needs the model says what is wrong with it. The base that an adapter names is not in the
    configuration, and stays as the adapter names it.
    """
    changes: dict[str, object] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            changes[name] = pinned(value)
        elif isinstance(value, tuple) and any(isinstance(one, Section) for one in value):
            changes[name] = tuple(pinned(one) if isinstance(one, Section) else one for one in value)
    for of_path, of_revision in _names(section):
        path, revision = getattr(section, of_path), getattr(section, of_revision)
        if path is not None and is_hub_id(path):
            with suppress(ConfigError):
                changes[of_revision] = HubRepository(path, revision).commit
    return section.model_copy(update=changes)


def _names(section: Section) -> list[tuple[str, str]]:
    """Fields of a section with a model's path, and its revision."""
    match section:
        case Judge():
            return [("model", "revision")]
        case ImplicitReward():
            return [("policy", "policy_revision"), ("reference", "reference_revision")]
    return [("path", "revision")] if {"path", "revision"} <= type(section).model_fields.keys() else []
