"""A model as the configuration names it: what it is known by, told without its weights, and its whole local folder.

It can be imported without torch and transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dpo_ray.config import Model
from dpo_ray.errors import ConfigError
from dpo_ray.model.cache import held
from dpo_ray.model.folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    WEIGHTS,
    load_tokenizer,
    matching,
    require_readable,
)
from dpo_ray.model.source import Source, is_hub_id, locate
from dpo_ray.model.tokenizer_files import read_template, tokenizer_hash
from dpo_ray.storage.artifact import digest


@dataclass(frozen=True)
class ModelFolder:
    """A model, wherever it lies. Only `path` fetches weights; all else needs its small files alone."""

    place: str
    """As model.path."""
    revision: str | None = None
    """As model.revision."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Given to the chat template."""
    chat_template: str | None = None
    """As model.chat_template."""
    within: tuple[str, ...] = ()
    """The adapters whose base it is."""

    @classmethod
    def of(cls, model: Model) -> ModelFolder:
        return cls(model.path, model.revision, model.trust_remote_code, model.template_arguments, model.chat_template)

    @cached_property
    def path(self) -> Path:
        """The local folder of the whole model, which stays as long as this process lives.

        A folder is taken as it is; a GGUF file, a URI or a hub id becomes a copy made once. A PEFT adapter, wherever it
        lies, becomes a folder of its base model in float32 with the adapter merged into it, made once.

        Raises ConfigError where there is nothing to load.
        """
        folder = self._source.fetched()
        if not self.is_adapter:
            return folder
        with self._of_base() as base:
            below = base.path
        name = f"{folder.name}-merged-{digest([self._source.version(), str(below), base.version])}"

        def fill(target: Path) -> None:
            from dpo_ray.model.lora import merge

            merge(below, folder).save_pretrained(target)
            # As it lies there: the folder is kept for every run, whatever template it names.
            load_tokenizer(self.tokenizer_folder, trust_remote_code=self.trust_remote_code).save_pretrained(target)

        return held(name, fill)

    @cached_property
    def description(self) -> Path:
        """A local folder with the model's configuration, and perhaps no weights; of an adapter, its base's.

        Raises ConfigError.
        """
        if not self.is_adapter:
            return self._source.described()
        with self._of_base() as base:
            return base.description

    @cached_property
    def is_adapter(self) -> bool:
        """Raises ConfigError where there is neither an adapter nor a whole model."""
        return require_readable(self._source.names(), self.place)

    @property
    def version(self) -> str:
        """Digest of what lies there, enough to name a copy by. Raises ConfigError."""
        if not self.is_adapter:
            return self._source.version()
        with self._of_base() as base:
            return digest([self._source.version(), base.version])

    @cached_property
    def tokenizer_folder(self) -> Path:
        """A local folder with the tokenizer's files: an adapter's own, or else its base's. Raises ConfigError."""
        if not self.is_adapter or "tokenizer_config.json" in self._source.names():
            return self._source.described()
        with self._of_base() as base:
            return base.tokenizer_folder

    @cached_property
    def template(self) -> str | None:
        """The text of the chat template that stands in place of the tokenizer's own. Raises ConfigError."""
        return None if self.chat_template is None else read_template(self.chat_template)

    def tokenizer(self) -> Any:
        """Raises ConfigError where none can be loaded."""
        return load_tokenizer(
            self.tokenizer_folder, trust_remote_code=self.trust_remote_code, chat_template=self.template
        )

    def weights_hash(self) -> str:
        """Digest over the configuration and the weights, and over the model's code where it is run.

        By content, so that the same files have the same hash in a local folder, on the hub and in an object store that
        they were exported to by this library. Weights that others put into an object store are known by place, size and
        time (dpo_ray.model.source). An adapter is known by its own content and its base's hash, and not by the merged
        weights, which are made only where they are used. Raises ConfigError.
        """
        names = self._source.names()
        code = ["*.py"] if self.trust_remote_code else []
        if not self.is_adapter:
            return digest(sorted(self._source.content(matching(names, CONFIG, WEIGHTS, *code)).items()))
        options = {k: v for k, v in self._adapter.items() if k not in ("base_model_name_or_path", "revision")}
        mine = self._source.content(matching(names, ADAPTER_WEIGHTS, *code))
        with self._of_base() as base:
            return digest(["adapter", options, sorted(mine.items()), base.weights_hash()])

    def tokenizer_hash(self) -> str:
        """Digest of what turns a dialogue into ids: tokenizer, chat template and its arguments, by content."""
        found = tokenizer_hash(self.tokenizer_folder)
        if self.template is not None:
            return digest([found, self.template_arguments, self.template])
        return digest([found, self.template_arguments]) if self.template_arguments else found

    def config(self) -> dict[str, Any]:
        """What stands in config.json; defaults of the model's class are not in it."""
        found: dict[str, Any] = json.loads((self.description / CONFIG).read_bytes())
        return found

    @cached_property
    def _source(self) -> Source:
        return locate(self.place, self.revision)

    @cached_property
    def _adapter(self) -> dict[str, Any]:
        """The adapter's configuration; empty where it cannot be read."""
        try:
            found = json.loads((self._source.described() / ADAPTER_CONFIG).read_bytes())
        except ValueError:
            found = {}
        return found if isinstance(found, dict) else {}

    @contextmanager
    def _of_base(self) -> Iterator[ModelFolder]:
        """The model that this adapter belongs to; what goes wrong with it is told with both names."""
        name, revision = self._adapter.get("base_model_name_or_path"), self._adapter.get("revision")
        if not name:
            raise ConfigError(
                f"The adapter {self.place} does not say which model it belongs to. Write the folder or hub id of its "
                f"base model into its {ADAPTER_CONFIG}, as base_model_name_or_path."
            )
        beside = self._source.described() / name
        path = str(beside.resolve()) if "://" not in name and beside.exists() else name
        within = (*self.within, self._source.place)
        if path in within:
            raise ConfigError(
                f"The adapter {self.place} names itself as the base model. Write the folder or hub id of the model "
                f"that it was trained on into its {ADAPTER_CONFIG}, as base_model_name_or_path."
            )
        try:
            yield ModelFolder(path, revision if is_hub_id(path) else None, self.trust_remote_code, within=within)
        except ConfigError as error:
            raise ConfigError(
                f"The adapter {self.place} belongs to the base model {name}, which cannot be loaded. {error} Or write "
                f"the place of the base model into the adapter's {ADAPTER_CONFIG}, as base_model_name_or_path."
            ) from error


def adapter_base(model: Model) -> tuple[str, str | None]:
    """What an adapter that is trained on a model names as its base: place and revision, which outlive this run.

    Raises ConfigError where the model is an adapter itself: its base, the merged model, is nowhere but in the caches of
    the nodes, where nobody else finds it and it is evicted some day.
    """
    if ModelFolder.of(model).is_adapter:
        raise ConfigError(
            f"model.path is {model.path}, an adapter, and with model.lora.export=adapter another adapter would be "
            "published whose base, the merged model, is kept nowhere. Set model.lora.export=merged; or merge the "
            "adapter into its base first, and name the folder of the merged model."
        )
    if "://" in model.path or is_hub_id(model.path):
        return model.path, model.revision
    return str(Path(model.path).expanduser().absolute()), None


def resolve(path: str, revision: str | None = None) -> Path:
    """The local folder of a whole model, as ModelFolder.path. Raises ConfigError."""
    return ModelFolder(path, revision).path
