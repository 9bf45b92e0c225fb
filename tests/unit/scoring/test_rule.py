"""Rules: loaded by name, called for each completion or for all at once, and what becomes of those that fail."""

from __future__ import annotations

import functools
import json
import pickle
import sys
import types
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from dpo_ray.config.reward import Rule
from dpo_ray.errors import ConfigError, RewardError
from dpo_ray.rewards import brief_answer
from dpo_ray.scoring.rule import RuleScorer, load_function, require_fitting
from dpo_ray.scoring.scorer import weighted


def test_a_reward_is_loaded_by_name():
    assert load_function("dpo_ray.rewards:brief_answer") is brief_answer


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module_anywhere:f", "no_such_module_anywhere"),
        ("dpo_ray.no_such_module:f", "cannot be imported"),
        ("dpo_ray.rewards:no_such_function", "no_such_function"),
        ("dpo_ray.rewards:_STOP_WORDS", "not a function but frozenset"),
    ],
)
def test_a_reward_that_cannot_be_loaded_says_why(name: str, said: str):
    with pytest.raises(ConfigError) as caught:
        load_function(name)
    assert said in str(caught.value) and name in str(caught.value)


ROW = {
    "prompt_id": "00ff",
    "prompt": [{"role": "user", "content": "First."}, {"role": "user", "content": f"Why{'?' * 100}"}],
    "completions": [
        {"text": "{}", "finished": True, "num_tokens": 1, "logprob": -0.5},
        {"text": f"{{{'x' * 100}", "finished": False, "num_tokens": 3, "logprob": None},
    ],
}


def parses(prompt: str, completion: str, finished: bool) -> float:
    return measured(completion)


def measured(text: str) -> float:
    return float(len(json.loads(text)))


def line_of(code: str) -> int:
    return next(n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.strip() == code)


def scored(reward: Any, row: Any = ROW, **options: Any) -> list[tuple[float, Any]]:
    """Score and parts that a function gives to the completions of a row, as the rule my_rewards:mine."""
    module = types.ModuleType("my_rewards")
    module.mine = reward  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, my_rewards=module):
        [found] = RuleScorer(Rule(function="my_rewards:mine", **options)).score([row])
    assert all(one.noted == () for one in found)
    return [(one.score, one.parts) for one in found]


def failure(reward: Any, **options: Any) -> RewardError:
    with pytest.raises(RewardError) as caught:
        scored(reward, **options)
    return caught.value


def test_each_completion_is_scored_by_the_last_turn():
    seen: list[tuple[str, str, bool]] = []

    def reward(prompt: str, completion: str, finished: bool) -> float:
        seen.append((prompt, completion, finished))
        return float(len(seen))

    assert scored(reward) == [(1.0, {}), (2.0, {})]
    question = f"Why{'?' * 100}"
    assert seen == [(question, "{}", True), (question, f"{{{'x' * 100}", False)]


def test_a_reward_that_raises_is_told_with_the_completion_and_the_lines_of_its_code():
    error = failure(parses)
    here = str(Path(__file__))
    inner, outer = line_of("return float(len(json.loads(text)))"), line_of("return measured(completion)")
    assert str(error).startswith("The reward my_rewards:mine failed on completion 2 of the prompt 00ff ('Why???")
    assert f"→ '{{{'x' * 79}')" in str(error) and "?" * 78 not in str(error)
    assert "JSONDecodeError: Expecting property name" in str(error)
    assert f", at {here}:{inner} in measured, called at {here}:{outer} in parses. Mend it" in str(error)
    assert "\n" not in str(error)
    assert isinstance(error.__cause__, json.JSONDecodeError)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (RewardError, str(error))


def test_a_message_of_several_lines_stays_one_paragraph():
    def reward(prompt: str, completion: str, finished: bool) -> float:
        raise ValueError("first.\nsecond.\n")

    assert "ValueError: first. second, at " in str(failure(reward))


def test_a_reward_without_code_of_its_own_is_told_all_the_same():
    assert "TypeError" in str(failure(functools.partial(len, "a", "b"))) and " at " not in str(failure(len))


@pytest.mark.parametrize("value", [1, True, 0.5, np.float32(0.5), np.float64(0.5), np.int64(2), Fraction(1, 2)])
def test_any_real_number_is_a_score(value: Any):
    (score, _), _ = scored(lambda p, c, f: value)
    assert type(score) is float and score == value


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "gave None (NoneType)"),
        ("0.5", "gave '0.5' (str)"),
        (torch.tensor(0.5), "gave tensor(0.5000) (Tensor)"),
        (torch.tensor([0.5]), "(Tensor)"),
        (np.array([0.5]), "(ndarray)"),
        ({}, "gave {} (dict)"),
        ({"a": 0.5, "b": None}, "gave {'a': 0.5, 'b': None} (dict)"),
        (float("nan"), "gave nan (float)"),
        (float("-inf"), "gave -inf (float)"),
    ],
)
def test_what_is_no_finite_number_is_refused(value: Any, said: str):
    error = failure(lambda p, c, f: value)
    assert said in str(error)
    assert "to completion 1 of the prompt 00ff" in str(error) and "It must give a finite number" in str(error)


MODULES = ["syntax", "name", "file", "end", "library"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def score(p, c, f)\n    return 1.0\n", r"SyntaxError: expected ':'"),
        ("LIMIT = undefined\n", r"NameError: name 'undefined' is not defined, at .*failing_reward_1\.py:1"),
        ("WORDS = open('no_such_words.txt')\n", r"FileNotFoundError: .*no_such_words\.txt', at .*_reward_2\.py:1"),
        ("import sys\nsys.exit(2)\n", r"SystemExit: 2, at .*_reward_3\.py:2"),
        ("import no_such_library\n", r"ModuleNotFoundError: No module .*, at .*_reward_4\.py:1"),
    ],
    ids=MODULES,
)
def test_a_module_that_fails_is_told_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, source: str, said: str
):
    module = f"failing_reward_{MODULES.index(request.node.callspec.id)}"
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    expected = f"The reward {module}:score cannot be imported, for its module fails: .*{said}"
    with pytest.raises(ConfigError, match=expected):
        load_function(f"{module}:score")


def test_named_parts_sum_up_to_the_score():
    assert scored(lambda p, c, f: {"short": 1, "finished": -0.25 * f}) == [
        (0.75, {"short": 1.0, "finished": -0.25}),
        (1.0, {"short": 1.0, "finished": 0.0}),
    ]


def test_arguments_and_the_prompts_answer_are_given_by_name():
    def reward(prompt: str, completion: str, finished: bool, answer: str | None, *, worth: float) -> float:
        return worth * (answer == "{}")

    assert scored(reward, {**ROW, "answer": "{}"}, arguments={"worth": 3}) == [(3.0, {})] * 2
    assert scored(reward, ROW, arguments={"worth": 3}) == [(0.0, {})] * 2


def test_what_a_rule_asks_for_by_its_parameters_is_given():
    def reward(prompt: str, completion: str, finished: bool, logprob: float | None, num_tokens: int) -> float:
        return num_tokens + (logprob or 0.0)

    assert scored(reward) == [(0.5, {}), (3.0, {})]
    assert scored(lambda p, c, f, num_tokens: num_tokens, batch=True) == [(1.0, {}), (3.0, {})]


def test_a_batch_rule_is_called_once_with_lists():
    calls = []

    def reward(prompts: list[str], completions: list[str], finished: list[bool]) -> Any:
        calls.append((prompts, completions, finished))
        return np.arange(len(prompts))

    assert scored(reward, batch=True) == [(0.0, {}), (1.0, {})]
    question = f"Why{'?' * 100}"
    assert calls == [([question] * 2, ["{}", f"{{{'x' * 100}"], [True, False])]
    assert "gave 1 scores to 2 completions" in str(failure(lambda p, c, f: [0.5], batch=True))
    assert "failed on 2 completions at once, the first: completion 1 of" in str(failure(parses, batch=True))
    assert "gave nan" in str(failure(lambda p, c, f: [0.5, float("nan")], batch=True))


def test_a_row_without_completions_gets_no_scores():
    for batch in (False, True):
        assert scored(parses, {**ROW, "completions": []}, batch=batch) == []


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        ("length_window", {"most": 3}, "cannot be called .* \\(most\\): got an unexpected keyword argument 'most'"),
        ("matches", {}, "arguments of the configuration \\(none\\): missing a required argument: 'pattern'"),
        ("exact_answer", {"answer": "7"}, "is given `answer` by each call"),
        ("matches", {"pattern": "a", "prompt": "b"}, "is given `prompt` by each call"),
        ("split_sentences", {}, "cannot be called with prompt, completion and finished"),
    ],
)
def test_a_rule_that_cannot_be_called_is_refused_before_anything_runs(function: str, arguments: Any, said: str):
    with pytest.raises(ConfigError, match=said):
        require_fitting(Rule(function=f"dpo_ray.rewards:{function}", arguments=arguments))


def test_rules_that_fit_are_let_through():
    for function, arguments in (("exact_answer", {}), ("matches", {"pattern": "a"}), ("brief_answer", {})):
        require_fitting(Rule(function=f"dpo_ray.rewards:{function}", arguments=arguments))
    require_fitting(Rule(function="builtins:max"))  # of which Python knows no signature


def test_the_reward_is_the_weighted_sum_of_its_sources():
    assert weighted([[1.0, 0.0, 2.0], [0.5, 4.0, 0.0]], [1.0, -2.0]) == [0.0, -8.0, 2.0]
