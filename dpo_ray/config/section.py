"""What every section of the configuration is: a frozen record that refuses keys it does not know."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of the sections; the docstring under a field is its documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def changed(self, *names: str) -> list[str]:
        """Those of these options that have another value than their default.

        What refuses an option that has no use asks this and not which were given: a resolved configuration, which runs
        keep and jobs are submitted with, gives all of them.
        """
        fields = type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].get_default(call_default_factory=True)]
