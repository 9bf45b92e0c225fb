"""What gives completions their scores: sources, each with a weight."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dpo_ray.config.section import Section

Dtype = Literal["float32", "bfloat16"]


class _Source(Section):
    name: str | None = None
    """What the source is called in reports and in the lineage of pairs; left out: by what it is."""
    weight: float = 1.0
    """Its share in the weighted sum of all sources' scores; 0 measures without counting, below 0 less is better."""

    @property
    def label(self) -> str:
        """Its name, or what it is."""
        return self.name or self._kind()

    @abstractmethod
    def _kind(self) -> str:
        """What it is, in a word or two."""

    def identity(self) -> dict[str, Any]:
        """The options that change its scores; neither its name nor its weight does."""
        return self.model_dump(mode="json", exclude={"name", "weight"})


class Rule(_Source):
    """A Python function (dpo_ray.scoring.rule says how it is called)."""

    type: Literal["rule"] = "rule"
    function: str = Field(pattern=r"^[\w.]+:\w+$")
    """module:function."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Given to the function by name, in each call."""
    batch: bool = False
    """The function takes lists, all completions of a shard at once, and gives a list."""

    def _kind(self) -> str:
        return self.function.partition(":")[2]


class RewardModel(_Source):
    """A Hugging Face model for sequence classification, whose logit of a dialogue is the score."""

    type: Literal["reward_model"] = "reward_model"
    path: str
    """As model.path: a folder, a URI or a hub id."""
    revision: str | None = None
    """As model.revision."""
    trust_remote_code: bool = False
    """As model.trust_remote_code."""
    dtype: Dtype = "float32"
    """Precision of its forward."""
    engine: Literal["vllm", "torch", "auto"] = "auto"
    """Who computes it: vLLM's pooling runner, or transformers. auto: transformers on CPU; on GPUs (vllm.gpus_per_actor)
    vLLM, where it serves the model and gives the same scores, decided once for a model."""
    logit: int | None = Field(None, ge=0)
    """Which of its logits is the score, where it has several."""
    max_tokens: int = Field(2048, ge=1)
    """A longer dialogue loses its beginning, and is counted as `reward_cut`."""

    def _kind(self) -> str:
        return PurePath(self.path).name


class ImplicitReward(_Source):
    """What a policy trained by DPO holds to be the reward: beta·(log π(y|x) − log π_ref(y|x)) (arXiv:2305.18290)."""

    type: Literal["implicit"] = "implicit"
    policy: str
    """As model.path."""
    policy_revision: str | None = None
    """As model.revision."""
    reference: str | None = None
    """What it was trained from, as model.path; left out: model.path itself."""
    reference_revision: str | None = None
    """As model.revision."""
    trust_remote_code: bool = False
    """As model.trust_remote_code, of both."""
    dtype: Dtype = "float32"
    """Precision of both forwards."""
    beta: float = Field(0.1, gt=0.0)
    """The scale of the reward."""
    per_token: bool = False
    """Log-probs are averaged over the completion's tokens instead of summed."""

    def _kind(self) -> str:
        return f"implicit reward of {PurePath(self.policy).name}"

    @model_validator(mode="after")
    def _reference_is_named(self) -> ImplicitReward:
        if self.reference is None and self.reference_revision is not None:
            raise ValueError(
                f"an implicit reward's `reference_revision` ({self.reference_revision}) is of its `reference`, and "
                "none is named: name it, or set model.revision, which is what is taken then"
            )
        return self


class Endpoint(Section):
    """A server with OpenAI's interface for chats (/v1/chat/completions)."""

    base_url: str = Field(pattern=r"^https?://")
    """Such as http://host:8000/v1."""
    model: str
    """What the server calls the model."""
    api_key_env: str | None = None
    """Environment variable that holds the key, on every node; left out: the server wants none."""
    concurrent_requests: int = Field(8, ge=1)
    """Requests that are under way at once."""
    requests_per_minute: int | None = Field(None, ge=1)
    """At most so many are begun in a minute; null: no limit."""
    timeout_seconds: float = Field(120.0, gt=0.0)
    """How long an answer is waited for."""
    max_retries: int = Field(5, ge=0)
    """How often a request is sent again that failed, was refused for its rate, or took too long: after pauses that
    grow, or those that the server asks for."""


class Judge(_Source):
    """A language model that is asked which of two answers is better, or how good one is."""

    type: Literal["judge"] = "judge"
    model: str | None = None
    """As model.path, to be served by vLLM on the cluster; or else `endpoint`."""
    revision: str | None = None
    """As model.revision, of `model`."""
    trust_remote_code: bool = False
    """As model.trust_remote_code."""
    dtype: Dtype = "bfloat16"
    """Precision of `model`."""
    endpoint: Endpoint | None = None
    """A server that is asked."""
    compare: Literal["pairwise", "pointwise"] = "pairwise"
    """pairwise: every two answers to a prompt, in both orders; where the orders disagree it is a tie. An answer's score
    is the share of its comparisons that it wins, ties as halves. pointwise: each by itself; its score is 1 to 10."""
    criteria: str = "how helpful, correct and harmless the answer is"
    """What the judge is told to go by."""
    template: str | None = None
    """A file with the question in Jinja's syntax, of `conversation`, `criteria` and `answer_a` and `answer_b`, or
    `answer`; left out: dpo_ray/scoring/templates."""
    temperature: float = Field(0.0, ge=0.0)
    """Of the judge's own words."""
    max_tokens: int = Field(256, ge=1)
    """Of the judge's own words."""
    max_model_len: int = Field(4096, ge=1)
    """Tokens of a question and its reply, at most, where vLLM serves `model`."""
    structured: bool = True
    """The reply is held to its JSON schema while it is written; false for servers that do not offer it."""
    attempts: int = Field(3, ge=1)
    """How often a question is asked whose reply cannot be read. Then it is a tie, or 5.5, and counted."""

    def _kind(self) -> str:
        name = self.endpoint.model if self.endpoint is not None else self.model
        return f"judge {PurePath(str(name)).name}"

    def identity(self) -> dict[str, Any]:
        found = super().identity()
        if self.endpoint is not None:  # how fast and how patiently it is asked changes nothing
            found["endpoint"] = {"base_url": self.endpoint.base_url, "model": self.endpoint.model}
        return found

    @model_validator(mode="after")
    def _one_of_two(self) -> Judge:
        if (self.model is None) == (self.endpoint is None):
            found = "neither" if self.model is None else "both"
            raise ValueError(
                f"a judge is a model that is served here or an endpoint, but {found} is given: set `model` or "
                "`endpoint`, and leave the other out"
            )
        idle = self.changed("revision", "trust_remote_code", "dtype", "max_model_len") if self.endpoint else []
        if idle:
            raise ValueError(
                f"a judge's `{idle[0]}` is of a model that is served here, and this one is behind an endpoint, which "
                f"has its own: leave `{idle[0]}` out"
            )
        return self


Source = Annotated[Rule | RewardModel | Judge | ImplicitReward, Field(discriminator="type")]


def _as_sources(value: Any) -> Any:
    """module:function is short for one rule, and one source for a list of one."""
    if isinstance(value, str):
        value = {"function": value}
    sources = value if isinstance(value, list | tuple) else [value]
    return tuple({"type": "rule", **s} if isinstance(s, dict) and "function" in s else s for s in sources)


def _told_apart(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    if not sources:
        raise ValueError(
            "a reward needs one source at least: name a rule, as module:function, or a section with its `type`"
        )
    twice = [label for label, count in Counter(source.label for source in sources).items() if count > 1]
    if twice:
        raise ValueError(f"two sources are called {twice[0]}: give each a `name` of its own")
    if not any(source.weight for source in sources):
        raise ValueError(
            "all sources have weight 0, so that no completion is better than another: give one of them another weight"
        )
    return sources


_Written = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | Source | Annotated[tuple[Source, ...], Field(min_length=1)]
Reward = Annotated[
    tuple[Source, ...],
    BeforeValidator(_as_sources, json_schema_input_type=_Written),
    AfterValidator(_told_apart),
]
"""The sources, whose weighted sum is the reward: larger is better."""


def named(reward: Reward) -> str:
    """The sources in words, with their weights where these differ from 1."""
    return " + ".join(f"{f'{s.weight:g} ' if s.weight != 1 else ''}{s.label}" for s in reward)


def shared(one: Reward, other: Reward) -> list[str]:
    """Labels of the sources of `one` that are sources of `other` too, whatever their names and weights."""
    theirs = [source.identity() for source in other]
    return [source.label for source in one if source.identity() in theirs]


def compares(reward: Reward) -> bool:
    """Whether the reward is nothing but a judge's comparisons, so that a score is a share of wins. What has the weight
    0 does not count.
    """
    counted = [source for source in reward if source.weight != 0]
    return (
        len(counted) == 1
        and isinstance(counted[0], Judge)
        and counted[0].compare == "pairwise"
        and counted[0].weight > 0
    )


BRIEF_ANSWER: Reward = (Rule(function="dpo_ray.rewards:brief_answer"),)
"""What scores sampled answers where nothing is named."""
