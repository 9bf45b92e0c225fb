"""The section `publish.push_to_hub`: where on the Hugging Face Hub a published model goes."""

from __future__ import annotations

from pydantic import Field

from dpo_ray.config.section import Section


class PushToHub(Section):
    """A model repository of the hub, made where there is none. HF_TOKEN, or `hf auth login`, says who writes to it."""

    repo_id: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
    """owner/name."""
    private: bool = True
    """Who may see it, where it is made: its owner alone. One that is there stays as it is."""
    revision: str | None = Field(None, min_length=1)
    """The branch, made where there is none; left out: main."""

    @property
    def place(self) -> str:
        """owner/name@branch."""
        return f"{self.repo_id}@{self.revision or 'main'}"
