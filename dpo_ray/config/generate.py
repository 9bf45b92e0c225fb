"""The section `generate`, and how completions are sampled."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from dpo_ray.config.model import Model
from dpo_ray.config.pairing import CandidatePairing
from dpo_ray.config.reward import BRIEF_ANSWER, Dtype, Reward
from dpo_ray.config.section import Section


class Sampling(Section):
    """How completions are drawn. Samplers are vLLM's."""

    samples: int = Field(4, ge=1)
    """Completions sampled for each prompt."""
    include_greedy: bool = False
    """The first of them is the greedy one: at each place the likeliest token."""
    temperature: float = Field(1.0, ge=0.0)
    """Sampling temperature; 0 is greedy, with one sample."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Nucleus sampling: the smallest set of tokens with this probability mass."""
    top_k: int | None = Field(None, ge=1)
    """Only so many of the likeliest tokens; null: all."""
    min_p: float = Field(0.0, ge=0.0, lt=1.0)
    """Only tokens with this share of the likeliest one's probability."""
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    """Taken from the logits of tokens that the completion has."""
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    """Taken from the logits of tokens for each time that the completion has them."""
    repetition_penalty: float = Field(1.0, gt=0.0)
    """Divides the positive logits, and multiplies the negative ones, of tokens that prompt or completion have."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, which is then finished; they are not part of it."""
    max_tokens: int = Field(256, ge=1)
    """A completion is cut here, and is then not finished."""
    dtype: Dtype = "bfloat16"
    """Precision of the generating engine."""

    @model_validator(mode="after")
    def _combinations(self) -> Sampling:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"samples is {self.samples} with temperature 0, which would all be the same: set samples=1, or "
                "include_greedy=true with a temperature above 0"
            )
        if self.temperature == 0 and self.include_greedy:
            raise ValueError("include_greedy means nothing with temperature 0, where all is greedy: leave it out")
        if self.include_greedy and self.samples == 1:
            raise ValueError("include_greedy with samples=1 draws nothing else: set temperature=0 instead")
        if "" in self.stop:
            raise ValueError("stop holds an empty text, which would end every completion at once: leave it out")
        return self


_OF_MODEL = ("revision", "trust_remote_code", "chat_template", "template_arguments")


class SampledModel(Section):
    """A model that candidates are drawn from, or one of the ways in which it is asked for them."""

    path: str | None = None
    """As model.path; left out: `model` itself, and its other options."""
    revision: str | None = None
    """As model.revision."""
    trust_remote_code: bool = False
    """As model.trust_remote_code."""
    chat_template: str | None = None
    """As model.chat_template."""
    template_arguments: dict[str, Any] = Field(default_factory=dict)
    """As model.template_arguments."""
    samples: int = Field(ge=1)
    """Its completions of each prompt."""
    system_prompt: str | None = Field(None, min_length=1)
    """What it is asked with in place of the prompt's own system turn. The pairs are without: so a model learns to do
    unasked what it does when it is told (context distillation, arXiv:2112.00861)."""

    def model(self, policy: Model) -> Model:
        """As the section `model` would name it. policy: that section itself."""
        if self.path is None:
            return policy
        return Model(path=self.path, **self.model_dump(include=set(_OF_MODEL)))

    @model_validator(mode="after")
    def _of_the_model(self) -> SampledModel:
        if self.path is None and (given := self.changed(*_OF_MODEL)):
            raise ValueError(
                f"{given[0]} is an option of a model, but this entry names none and so draws from `model`: set it "
                "there, or name a `path`"
            )
        return self


class Generate(Section):
    """Pairs of completions that models sample of prompts, and that `reward` ranks."""

    prompts: str
    """JSON lines or Parquet with a `prompt` column (text or messages), and an `answer` where rules compare with one;
    package:// paths are allowed."""
    system_prompt: str | None = Field(None, min_length=1)
    """Put before prompts that have no system turn of their own; the pairs have it too."""
    sampling: Sampling = Sampling()
    """How completions are drawn."""
    models: tuple[SampledModel, ...] = ()
    """Who draws them, each its own number of samples. Left out: `model`, sampling.samples of them."""
    reward: Reward = BRIEF_ANSWER
    """What scores the completions: module:function, a source, or a list of sources with weights."""
    pairing: CandidatePairing = CandidatePairing()
    """How scored completions become pairs."""
    prompts_per_shard: int = Field(64, ge=1)
    """Prompts in a unit of work."""

    @property
    def samples(self) -> int:
        """Completions of each prompt, over all models."""
        return sum(model.samples for model in self.models) if self.models else self.sampling.samples

    @model_validator(mode="after")
    def _combinations(self) -> Generate:
        if self.models and self.sampling.changed("samples"):
            raise ValueError(
                f"generate.sampling.samples={self.sampling.samples} is of one model, but with generate.models each has "
                "`samples` of its own: leave it out"
            )
        if self.samples < 2:
            where = "generate.models[0].samples" if self.models else "generate.sampling.samples"
            raise ValueError(f"{where} is 1, but a pair needs at least 2 samples of a prompt: set it to 2 or more")
        return self

    @model_validator(mode="before")
    @classmethod
    def _earlier_names(cls, given: Any) -> Any:
        """min_score_gap and pairs_per_prompt stood here before `pairing` did, and are read as its own."""
        moved = {"min_score_gap", "pairs_per_prompt"}
        if not isinstance(given, dict) or not moved & given.keys():
            return given
        pairing = dict(given.get("pairing") or {})
        for name in sorted(moved & given.keys()):
            if name in pairing:
                raise ValueError(
                    f"generate.{name} is an earlier name of generate.pairing.{name}, and both are given: leave one out"
                )
            pairing[name] = given[name]
        return {key: value for key, value in given.items() if key not in moved} | {"pairing": pairing}
