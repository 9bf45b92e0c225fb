"""The section `evaluate`."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath
from typing import Annotated, Any

from pydantic import Field, model_validator

from dpo_ray.config.generate import Sampling
from dpo_ray.config.model import Model
from dpo_ray.config.reward import BRIEF_ANSWER, Reward
from dpo_ray.config.section import Section
from dpo_ray.config.sources import Paths

BASE_MODEL = "the base model"
"""What `model` is called where others are compared with it."""

SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
"""How a set of held-out pairs is called."""


class Opponent(Section):
    """A model that the tuned one is compared with."""

    path: str
    """As model.path."""
    revision: str | None = None
    """As model.revision."""
    trust_remote_code: bool = False
    """As model.trust_remote_code."""
    chat_template: str | None = None
    """As model.chat_template."""
    template_arguments: dict[str, Any] = Field(default_factory=dict)
    """As model.template_arguments."""

    def model(self) -> Model:
        """As the section `model` would name it."""
        return Model(**dict(self))


class WinRate(Section):
    """Sampled answers of the tuned model against another one's."""

    against: Opponent | None = None
    """Whose answers the tuned model's are compared with; left out: the base model's, `model` itself."""
    sampling: Sampling = Sampling()
    """How completions are drawn from the tuned model and from the other one."""
    reward: Reward = BRIEF_ANSWER
    """Who judges: module:function, a source, or a list of sources with weights."""
    max_prompts: int = Field(256, ge=1)
    """At most so many held-out prompts, the first by prompt id."""

    @property
    def opponent(self) -> str:
        """What the other model is called."""
        return PurePath(self.against.path).name if self.against is not None else BASE_MODEL


class Tasks(Section):
    """Benchmark tasks of lm-evaluation-harness (the extra `tasks`)."""

    names: tuple[str, ...] = Field(min_length=1)
    """Its tasks, tags and groups, as `lm-eval ls tasks` lists them, or those of include_path."""
    include_path: str | None = None
    """A folder with task files (YAML) of your own, seen by every node; null: the library's tasks alone."""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples before each question; null: each task's own number. A task whose own is 0 keeps it."""
    limit: int | None = Field(None, ge=1)
    """Only the first so many documents of a task, or of each task of a group; null: all."""
    batch_size: int = Field(8, ge=1)
    """Sequences that the model computes at once."""

    @model_validator(mode="after")
    def _once(self) -> Tasks:
        if twice := [name for name, count in Counter(self.names).items() if count > 1]:
            raise ValueError(f"evaluate.tasks.names has {twice[0]} twice: name each task once")
        return self


class Evaluate(Section):
    """What is measured of the tuned model, beside its accuracy on held-out pairs."""

    sets: dict[SetName, Paths] = Field(default_factory=dict)
    """Further held-out preference data by names of your own, such as the files of RewardBench: on each the accuracy is
    measured. Named like data.train; read by their own columns (prompt, chosen, rejected and so on)."""
    win_rate: WinRate | None = None
    """Tuned against base, or another model, on held-out prompts; left out: not measured."""
    max_pairs: int = Field(100_000, ge=1)
    """Held-out pairs that the accuracy is measured on, about, at most: drawn at random, the same ones each time. So
    many give it to within 0.3%."""
    tasks: Tasks | None = None
    """Base and tuned model on benchmark tasks; left out: not measured."""
