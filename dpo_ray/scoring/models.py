"""The model behind a source of scores."""

from __future__ import annotations

from dpo_ray.config import ImplicitReward, Judge, Model, RewardModel


def model_of(source: RewardModel | Judge | ImplicitReward) -> Model:
    """The model that a source names, as the section `model` would name it; of a judge, one that is served here."""
    match source:
        case RewardModel():
            path, revision = source.path, source.revision
        case Judge():
            assert source.model is not None
            path, revision = source.model, source.revision
        case ImplicitReward():
            path, revision = source.policy, source.policy_revision
    return Model(path=path, revision=revision, dtype=source.dtype, trust_remote_code=source.trust_remote_code)


def reference_of(source: ImplicitReward, policy: Model) -> Model:
    """What an implicit reward is measured against: its own reference, or the model of the configuration."""
    if source.reference is None:
        return policy.model_copy(update={"dtype": source.dtype, "lora": None})
    return Model(
        path=source.reference,
        revision=source.reference_revision,
        dtype=source.dtype,
        trust_remote_code=source.trust_remote_code,
    )
