"""The section of a reward, and the sampling and pairing of candidates."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_ray.config import CandidatePairing, Config, Generate, Rule, parse_config
from dpo_ray.config.reward import compares
from dpo_ray.errors import ConfigError


def config(**generate: Any) -> Config:
    return parse_config(
        {"run": {"name": "n", "output": "o"}, "model": {"path": "m"}, "generate": {"prompts": "p.jsonl", **generate}}
    )


def generate(**values: Any) -> Generate:
    found = config(**values).generate
    assert found is not None
    return found


def message(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config(**values)
    return str(caught.value)


ENDPOINT = {"base_url": "http://h/v1", "model": "org/big"}


def test_a_function_is_short_for_a_rule_and_one_source_for_a_list():
    short = generate(reward="m:f").reward
    assert short == (Rule(function="m:f"),)
    assert generate(reward={"function": "m:f"}).reward == short
    assert generate(reward=[{"type": "rule", "function": "m:f"}]).reward == short


def test_a_source_is_called_by_what_it_is_unless_it_has_a_name():
    reward = generate(
        reward=[
            {"function": "m:f", "weight": -0.5},
            {"type": "reward_model", "path": "models/rm"},
            {"type": "implicit", "policy": "models/tuned"},
            {"type": "judge", "endpoint": ENDPOINT},
            {"type": "judge", "model": "j", "name": "mine"},
        ]
    ).reward
    assert [(s.label, s.weight) for s in reward] == [
        ("f", -0.5), ("rm", 1.0), ("implicit reward of tuned", 1.0), ("judge big", 1.0), ("mine", 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ([], "generate.reward: a reward needs one source at least"),
        ([{"function": "m:f"}, {"function": "n:f"}], "two sources are called f: give each a `name`"),
        (
            [{"function": "m:f", "weight": 0}],
            "all sources have weight 0, so that no completion is better than another: give one of them",
        ),
        (
            [{"type": "magic"}],
            r"generate.reward[0].type='magic' is not known here (known here: rule, reward_model, judge",
        ),
        ([{"type": "reward_model"}], "generate.reward[0].path is missing"),
        ([{"function": "m"}], "generate.reward[0].function='m'"),
        (
            [{"type": "judge"}],
            "a judge is a model that is served here or an endpoint, but neither is given: set `model` or `endpoint`",
        ),
        ([{"type": "judge", "model": "j", "endpoint": ENDPOINT}], "but both is given"),
        (
            [{"type": "judge", "endpoint": ENDPOINT, "max_model_len": 8192}],
            "a judge's `max_model_len` is of a model that is served here, and this one is behind an endpoint",
        ),
        (
            [{"type": "implicit", "policy": "p", "reference_revision": "x"}],
            "an implicit reward's `reference_revision` (x) is of its `reference`, and none is named",
        ),
        ([{"type": "judge", "endpoint": {**ENDPOINT, "base_url": "h"}}], "generate.reward[0].endpoint.base_url='h'"),
        ([{"function": "m:f", "wait": 1}], "generate.reward[0].wait is not a known key; did you mean weight?"),
    ],
)
def test_a_reward_that_means_nothing_is_refused(reward: Any, said: str):
    assert said in message(reward=reward)


def test_the_identity_of_a_source_is_what_changes_its_scores():
    def identity(**values: Any) -> dict[str, Any]:
        endpoint = {**ENDPOINT, **{k: values.pop(k) for k in ("timeout_seconds", "max_retries") if k in values}}
        [source] = generate(reward={"type": "judge", "endpoint": endpoint, **values}).reward
        return source.identity()

    same = {"name": "n", "weight": 2.0, "timeout_seconds": 1.0, "max_retries": 9}
    assert identity() == identity(**same)
    for changed in ({"criteria": "wit"}, {"compare": "pointwise"}, {"temperature": 0.5}, {"attempts": 1}):
        assert identity(**changed) != identity()


def test_a_reward_compares_where_it_is_one_pairwise_judge():
    judge = {"type": "judge", "model": "j"}
    assert compares(generate(reward=judge).reward)
    assert not compares(generate(reward={**judge, "compare": "pointwise"}).reward)
    assert not compares(generate(reward={**judge, "weight": -1}).reward)
    assert not compares(generate(reward=[judge, {"function": "m:f"}]).reward)
    assert not compares(generate(reward="m:f").reward)


def test_the_earlier_names_of_pairing_are_read():
    found = generate(min_score_gap=0.2, pairs_per_prompt=3)
    assert found.pairing == CandidatePairing(min_score_gap=0.2, pairs_per_prompt=3)
    both = generate(min_score_gap=0.2, pairing={"strategy": "top_k"})
    assert both.pairing == CandidatePairing(min_score_gap=0.2, strategy="top_k")
    said = message(min_score_gap=0.2, pairing={"min_score_gap": 0.3})
    assert "generate.min_score_gap is an earlier name of generate.pairing.min_score_gap, and both are given" in said


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ({"temperature": 0}, "samples is 4 with temperature 0, which would all be the same"),
        ({"temperature": 0, "samples": 1, "include_greedy": True}, "include_greedy means nothing with temperature 0"),
        ({"samples": 1, "include_greedy": True}, "include_greedy with samples=1 draws nothing else"),
        ({"stop": [""]}, "stop holds an empty text"),
        ({"samples": 1}, "generate.sampling.samples is 1, but a pair needs at least 2"),
        ({"min_p": 1.0}, "generate.sampling.min_p=1.0"),
        ({"top_k": 0}, "generate.sampling.top_k=0"),
    ],
)
def test_sampling_that_cannot_make_pairs_is_refused(sampling: dict[str, Any], said: str):
    assert said in message(sampling=sampling)


def test_each_of_several_models_has_its_share_of_the_samples():
    models = [{"path": "a", "samples": 3}, {"path": "b", "samples": 1}]
    assert generate(models=models).samples == 4
    assert generate(sampling={"samples": 6}).samples == 6
    assert "generate.sampling.samples=2 is of one model" in message(models=models, sampling={"samples": 2})
    assert "generate.models[0].samples is 1" in message(models=models[1:])
    assert "generate.models[0].samples is missing" in message(models=[{"path": "a"}])


def test_an_entry_that_names_no_model_has_no_options_of_one():
    models = [{"samples": 2, "trust_remote_code": True}]
    assert "trust_remote_code is an option of a model, but this entry names none" in message(models=models)


@pytest.mark.parametrize(
    ("pairing", "said"),
    [
        ({"strategy": "worst"}, "generate.pairing.strategy='worst'"),
        ({"max_similarity": 1.0}, "generate.pairing.max_similarity=1.0"),
        ({"max_length_ratio": 1.0}, "generate.pairing.max_length_ratio=1.0"),
        ({"truncated": "only_chosen"}, "generate.pairing.truncated='only_chosen'"),
    ],
)
def test_a_rule_out_of_range_is_refused(pairing: dict[str, Any], said: str):
    assert said in message(pairing=pairing)


def test_ranked_rows_know_no_rule_of_candidates():
    with pytest.raises(ConfigError, match=r"data\.pairing\.truncated is not a known key"):
        parse_config(
            {
                "run": {"name": "n", "output": "o"},
                "model": {"path": "m"},
                "data": {"train": "t", "pairing": {"truncated": "drop"}},
            }
        )


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ([{"type": "judge", "model": "j"}], True),
        ([{"type": "judge", "model": "j", "weight": 2.0}], True),
        ([{"type": "judge", "model": "j"}, {"function": "a:b", "weight": 0.0}], True),
        ([{"type": "judge", "model": "j"}, {"function": "a:b"}], False),
        ([{"type": "judge", "model": "j", "compare": "pointwise"}], False),
        ([{"type": "judge", "model": "j", "weight": -1.0}], False),
        ([{"function": "a:b"}], False),
    ],
)
def test_what_has_no_weight_does_not_change_how_a_win_is_counted(sources: list[dict[str, Any]], expected: bool):
    tree = {"run": {"name": "n", "output": "o"}, "model": {"path": "m"}, "data": {"train": "t"}}
    config = parse_config({**tree, "evaluate": {"win_rate": {"reward": sources}}})
    assert config.evaluate.win_rate is not None
    assert compares(config.evaluate.win_rate.reward) == expected
