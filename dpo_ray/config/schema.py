"""The configuration's JSON Schema, by which editors complete and check a file before anything reads it.

A schema says less than the tree: that two options exclude each other, or that a file is there, is told when it loads.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue
from pydantic_core import core_schema

from dpo_ray.config.reward import Rule
from dpo_ray.config.section import Section
from dpo_ray.config.tree import Config

_TITLE = "Configuration of dpo-ray"
_ABOUT = "One file for `dpo-ray run`, its stages, `sweep` and `iterate`."


def config_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a configuration file. A description is the docstring of its field."""
    made = Config.model_json_schema(schema_generator=_Schema)
    return {"$schema": GenerateJsonSchema.schema_dialect, **made, "title": _TITLE, "description": _ABOUT}


def written_schema() -> str:
    """The same as a file has it."""
    return f"{json.dumps(config_schema(), indent=2, ensure_ascii=False)}\n"


class _Schema(GenerateJsonSchema):
    def generate(self, schema: core_schema.CoreSchema, mode: JsonSchemaMode = "validation") -> JsonSchemaValue:
        made = super().generate(schema, mode)
        _tidy(made)
        return made

    def encode_default(self, dft: Any) -> Any:
        """What stands in a section's place is written as short as a file would have it."""
        if isinstance(dft, Section):
            return dft.model_dump(mode="json", exclude_unset=True)
        if isinstance(dft, tuple | list):
            return [self.encode_default(one) for one in dft]
        return super().encode_default(dft)

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        """A section that `type` chooses is told apart by it, and described where its `type` is."""
        made = super().model_schema(schema)
        kind = made.get("properties", {}).get("type", {})
        # Of all sources of scores only a rule is known by another key, its function.
        if "const" in kind and schema["cls"] is not Rule and "type" not in made.get("required", ()):
            made["required"] = ["type", *made.get("required", ())]
            kind.pop("default")
        if "const" in kind and "description" in kind:
            made.setdefault("description", kind["description"])
        elif "const" in kind:
            kind["description"] = made["description"]
        return made

    def dict_schema(self, schema: core_schema.DictSchema) -> JsonSchemaValue:
        made = super().dict_schema(schema)
        if "patternProperties" in made:
            made["additionalProperties"] = False
        return made

    def get_title_from_name(self, name: str) -> str:
        """A key is its own title."""
        return name


def _tidy(node: Any) -> None:
    """Descriptions in one line; no default where it is a section that is left out."""
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _tidy(child)
    if isinstance(node, dict):
        if isinstance(node.get("description"), str):
            node["description"] = " ".join(node["description"].split())
        if node.get("default") == {}:
            del node["default"]
