"""Who candidates are drawn from, and in how many ways each is asked."""

from __future__ import annotations

from dpo_ray.config import Generate, Model
from dpo_ray.shards.generate import Ask
from pipelines.generate import asks_of


def test_a_model_may_be_asked_in_several_ways_and_is_one_engine():
    policy = Model(path="m", revision="main")
    told = {"samples": 3, "system_prompt": "Be brief."}
    other = {"path": "b", "template_arguments": {"enable_thinking": False}}
    options = Generate(prompts="p", models=[{"samples": 2}, {**other, "samples": 1}, told, {**other, **told}])
    assert asks_of(options, policy) == [
        (policy, [Ask(2), Ask(3, "Be brief.")]),
        (Model(**other), [Ask(1), Ask(3, "Be brief.")]),
    ]
    assert asks_of(Generate(prompts="p", sampling={"samples": 6}), policy) == [(policy, [Ask(6)])]
