"""What decides about rounds; the rounds themselves are in tests/vllm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config import Config, parse_config
from dpo_ray.errors import ConfigError, DataError
from pipelines.iterate import improves, part_of, require_prompts
from pipelines.show import iterate_lines

TREE: dict[str, Any] = {
    "run": {"name": "n", "output": "o"},
    "model": {"path": "m"},
    "generate": {"prompts": "p.jsonl"},
    "evaluate": {"win_rate": {}},
    "iterate": {"rounds": 2},
}


def test_each_prompt_is_in_one_part_and_parts_are_about_equal():
    parts = [part_of(f"{n:016x}", 3) for n in range(3000)]
    assert {1, 2, 3} == set(parts)
    assert all(900 < parts.count(part) < 1100 for part in (1, 2, 3))
    assert part_of("any", 1) == 1


@pytest.mark.parametrize(("low", "better"), [(0.61, True), (0.6, False), (0.5, False)])
def test_a_round_improves_where_its_whole_interval_lies_above_the_best(low: float, better: bool):
    assert (
        improves({"value": 0.7, "low": low, "high": 0.8, "n": 9}, {"value": 0.6, "low": 0.5, "high": 0.7, "n": 9})
        == better
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluate": {}}, "goes by its win rate, but there is no evaluate.win_rate"),
        ({"generate": None, "data": {"train": "t"}}, "but there is no generate"),
        (
            {"generate": {"prompts": "p", "models": [{"path": "a", "samples": 2}]}},
            "with iterate the policy of each round samples",
        ),
        ({"iterate": {"rounds": 0}}, "iterate.rounds=0"),
        ({"iterate": {"replay": 1.0}}, "iterate.replay=1.0"),
    ],
)
def test_rounds_that_cannot_be_run_are_refused(changes: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as caught:
        parse_config({**TREE, **changes})
    assert said in str(caught.value)


def test_a_dry_run_tells_the_rounds():
    text = "\n".join(iterate_lines(parse_config(TREE)))
    assert "at most 2 rounds, each with a part of the prompts of its own" in text and "the best round" in text
    more = parse_config({**TREE, "iterate": {"prompts": "repeated", "reference": "first", "replay": 0.25}})
    text = "\n".join(iterate_lines(more))
    assert "all prompts and with the first model as reference, 0.25 of its pairs from earlier rounds" in text


def rounds_over(tmp_path: Path, count: int, **options: Any) -> Config:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(count)))
    changes = {"generate": {"prompts": str(file)}, "data": {"held_out_fraction": 0.4}, "iterate": options}
    return parse_config({**TREE, **changes})


def test_rounds_need_prompts_each(tmp_path: Path):
    require_prompts(rounds_over(tmp_path, 60, rounds=3))
    require_prompts(rounds_over(tmp_path, 6, rounds=20, prompts="repeated"))
    with pytest.raises(DataError, match=r"of the 20 rounds with prompts of their own .* would have none: add prompts"):
        require_prompts(rounds_over(tmp_path, 6, rounds=20))
