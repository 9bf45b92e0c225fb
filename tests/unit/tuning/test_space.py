"""The search space: what it draws, what it refuses, and which trials share their rows."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_ray.config import Config, dump_config, parse_config
from dpo_ray.config.tune import Choice, Range
from dpo_ray.errors import ConfigError
from tuning.preparations import preparation_key, preparations
from tuning.space import (
    Given,
    drawn,
    extreme_configs,
    labels,
    points,
    require_space,
    trial_config,
)

LOSSES = {
    "choice": [
        {"type": "sigmoid", "beta": {"loguniform": [0.01, 0.5]}},
        {"type": "ipo", "beta": {"uniform": [0.1, 0.9]}},
        {"type": "kto"},
        {"type": "orpo"},
    ]
}


def config(tune: dict[str, Any], **sections: Any) -> Config:
    tree = {
        "run": {"name": "x", "output": "out"},
        "model": {"path": "m"},
        "data": {"train": "rows"},
        "train": {"loss": {"type": "sigmoid", "beta": 0.1}, "eval_every_steps": 5},
        **sections,
        "tune": tune,
    }
    return parse_config(tree)


def searched(space: dict[str, Any], **tune: Any) -> Config:
    return config({"space": space, "search": "random", "num_trials": 5, **tune})


def test_lists_are_choices_and_paths_may_be_nested():
    by_path = searched({"train.epochs": [1, 2], "model.lora.rank": {"choice": [8, 16]}})
    nested = searched({"train": {"epochs": [1, 2]}, "model": {"lora": {"rank": [8, 16]}}})
    assert (
        by_path.tune.space == nested.tune.space == {"train.epochs": Choice((1, 2)), "model.lora.rank": Choice((8, 16))}
    )


def test_a_dumped_space_is_the_same_space():
    made = searched({"train.loss": LOSSES, "train.learning_rate": {"loguniform": [1e-6, 1e-4]}})
    import yaml

    assert parse_config(yaml.safe_load(dump_config(made))) == made
    assert made.tune.space["train.learning_rate"] == Range("loguniform", 1e-6, 1e-4)


def test_the_lists_of_beta_and_learning_rate_are_a_grid_over_their_paths():
    grid = config({"beta": [0.1, 0.2], "learning_rate": [1e-5, 1e-4]})
    found = [trial_config(grid, point) for point in points(grid.tune.searched())]
    assert [(one.train.loss.beta, one.train.learning_rate) for one in found] == [
        (0.1, 1e-5),
        (0.1, 1e-4),
        (0.2, 1e-5),
        (0.2, 1e-4),
    ]
    assert all(one.tune is None and one.train.eval_fraction == grid.tune.ranked_fraction for one in found)


def test_a_grid_takes_whole_numbers_of_a_range_and_the_options_parts():
    grid = config(
        {
            "space": {
                "train.epochs": {"integer": [1, 3]},
                "train.loss": [{"type": "sigmoid", "beta": {"choice": [0.1, 0.3]}}, {"type": "orpo"}],
            }
        }
    )
    found = [drawn(grid.tune.searched(), Given(point)) for point in points(grid.tune.searched())]
    assert len(found) == 3 * (2 + 1)
    assert found[0] == {"train.epochs": 1, "train.loss": {"type": "sigmoid", "beta": 0.1}}
    assert found[-1] == {"train.epochs": 3, "train.loss": {"type": "orpo"}}


def test_a_value_inside_of_an_option_has_the_options_label_in_its_name():
    space = searched({"train.loss": LOSSES}).tune.searched()
    point = {"train.loss": "ipo", "train.loss[ipo].beta": 0.4}
    assert drawn(space, Given(point)) == {"train.loss": {"type": "ipo", "beta": 0.4}}
    assert labels(space["train.loss"]) == ["sigmoid", "ipo", "kto", "orpo"]


def test_options_of_one_type_are_told_apart():
    twice = Choice(({"type": "sigmoid", "beta": 0.1}, {"type": "sigmoid", "beta": 0.2}, True, None, "word", 3))
    assert len(set(labels(twice))) == 6


def test_another_loss_brings_none_of_the_first_ones_options():
    made = searched({"train.loss": LOSSES})
    assert trial_config(made, {"train.loss": "orpo"}).train.loss.model_dump(exclude_unset=True) == {"type": "orpo"}


def test_a_path_below_a_default_section_needs_no_section_in_the_file():
    made = config({"space": {"train.loss.beta": [0.2], "model.lora.rank": [4]}}, train={})
    one = trial_config(made, next(points(made.tune.searched())))
    assert (one.train.loss.type, one.train.loss.beta, one.model.lora.rank) == ("sigmoid", 0.2, 4)


def test_the_ends_of_all_ranges_are_tried_for_each_option():
    made = searched({"train.loss": LOSSES, "train.learning_rate": {"loguniform": [1e-6, 1e-4]}})
    found = {
        (c.train.loss.type, getattr(c.train.loss, "beta", None), c.train.learning_rate) for c in extreme_configs(made)
    }
    for rate in (1e-6, 1e-4):
        assert {("sigmoid", 0.01, rate), ("sigmoid", 0.5, rate), ("ipo", 0.1, rate), ("ipo", 0.9, rate)} <= found


def test_a_space_of_many_dimensions_is_checked_in_little_time():
    wide = {f"train.{name}": {"uniform": [0.0, 0.5]} for name in ("weight_decay", "warmup_fraction")}
    wide |= {"train.learning_rate": {"loguniform": [1e-7, 1e-4]}, "train.max_grad_norm": {"uniform": [0.1, 2.0]}}
    wide |= {"train.ema_decay": {"uniform": [0.9, 0.999]}, "train.epochs": {"integer": [1, 4]}}
    wide |= {"train.global_batch_size": [2**n for n in range(3, 12)], "train.loss": LOSSES}
    made = searched(wide)
    require_space(made)
    assert len(extreme_configs(made)) < 700


@pytest.mark.parametrize(
    ("tune", "says"),
    [
        ({"space": {"train.los.beta": [1]}}, "train.los is not a known key; did you mean loss"),
        ({"space": {"trainn.learning_rate": [1]}}, "trainn is not a known key; did you mean train"),
        ({"space": {"train.learning_rate": {"logunform": [1e-6, 1]}}}, "did you mean loguniform"),
        ({"space": {"train.learning_rate": {"uniform": [1, 0.1]}}}, "does not rise: write the smaller number first"),
        ({"space": {"train.learning_rate": {"loguniform": [0, 1]}}}, "a logarithm needs numbers above 0"),
        ({"space": {"train.learning_rate": {"uniform": [0.1]}}}, r"write \{uniform: \[low, high\]\}"),
        ({"space": {"train.learning_rate": {"uniform": ["a", "b"]}}}, r"is not two numbers"),
        ({"space": {"train.epochs": {"integer": [1, 2.5]}}}, "are not whole numbers: round them"),
        (
            {"space": {"train.epochs": []}},
            r"a choice is a list of values, not \[\]: write it as in \{choice: \[1, 2\]\}",
        ),
        ({"space": {"train.epochs": [1, 1]}}, "has 1 twice: name it once"),
        ({"space": {"train.epochs": 3}}, "3 is no distribution"),
        (
            {"space": {"train.learning_rate": {"uniform": [-1, 1]}}, "search": "random", "num_trials": 2},
            "greater than 0",
        ),
        (
            {"space": {"train.loss.label_smoothing": {"uniform": [0, 0.9]}}, "search": "random", "num_trials": 2},
            "less than 0.5",
        ),
        ({"space": {"train.learning_rate": {"uniform": [1e-6, 1e-4]}}}, "a grid needs values"),
        ({"space": {"train.loss.type": ["sigmoid", "orpo"]}}, "search train.loss as a whole"),
        ({"space": {"train.loss": [{"type": "ipo", "ld_alpha": 0.5}]}}, "set log_ratio to sum"),
        ({"space": {"train.loss": [{"type": "ipo", "beta": [0.1, 0.2]}]}}, r"is written \{choice: \[\.\.\.\]\}"),
        ({"space": {"train.loss": LOSSES["choice"], "train.loss.beta": [0.1]}}, "into the options of train.loss"),
        ({"space": {"train.loss": LOSSES["choice"]}, "beta": [0.1]}, "put beta into its options"),
        ({"space": {"train.learning_rate": [1e-5]}, "learning_rate": [1e-5]}, "leave one of them out"),
        ({"space": {"train.num_workers": [1, 2]}}, "all its values give one model"),
        ({"space": {"train.eval_pairs": [1, 2]}}, "must be the same for all"),
        ({"space": {"data.held_out_fraction": [0.1, 0.2]}}, "which pairs are held out"),
        (
            {"space": {"data.train": ["a", "b"]}},
            "unless held-out pairs are named as data.eval. Take it out of tune.space",
        ),
        ({"space": {"run.seed": [0, 1]}}, "tune.repeat_best"),
        ({"space": {"run.name": ["a", "b"]}}, "about the whole sweep"),
        ({"space": {"publish.gate.accuracy_above": [0.5]}}, "trials are not measured by it"),
        ({"space": {"reference.engine": ["vllm", "torch"]}}, "how the reference is computed"),
        ({"space": {"model.trust_remote_code": [True]}}, "about the model's files"),
        ({"space": {"data.max_prompt_tokens": {"integer": [1, 9]}}}, "list the values"),
        (
            {"space": {"train.loss": LOSSES["choice"][:2]}, "rank_by": "margin", "search": "random", "num_trials": 2},
            "rank by accuracy",
        ),
        (
            {"space": {"train.loss": [{"type": "simpo"}, {"type": "cpo"}]}, "rank_by": "margin"},
            "a mean over tokens without a reference; a sum over tokens without a reference.: rank by accuracy",
        ),
        (
            {"space": {"train.loss": [{"type": "orpo"}, {"type": "simpo"}]}, "rank_by": "margin"},
            "a mean over tokens without a reference; log odds",
        ),
        ({"beta": [0.1], "rank_by": "loss"}, "rank these, not the policies"),
        ({"beta": [0.1], "rank_by": "eval_rewards/margins"}, "the largest β would win"),
        ({"beta": [0.1], "rank_by": {"accuracy": 1, "loss": 2}}, "rank these, not the policies"),
        ({"beta": [0.1], "rank_by": "acuracy"}, "there is no such measure"),
        ({"beta": [0.1], "rank_by": ["accuracy"]}, "a list is for several objectives"),
        ({"beta": [0.1], "rank_by": {"accuracy": 0}}, "a weight is a number above 0"),
        ({"beta": [0.1], "rank_by": {"accuracy": 1, "likelihood_drop": -0.1}}, "counts in its own direction"),
        ({"beta": [0.1], "rank_by": {"accuracy": float("nan")}}, "a weight is a number above 0"),
        ({"space": {"train": [{"epochs": 1}, {"epochs": 2}]}}, "train cannot be searched as a whole"),
        ({"space": {"model.lora.quantization": ["nf4", "int8"]}}, "it changes the reference"),
        ({"space": {"train.activation_offload": [True, False]}}, "where and how fast trials train"),
        ({"space": {"train.epochs": {"uniform": [1, 3]}}, "search": "random", "num_trials": 2}, r"\{integer: "),
        ({"space": {"train.learning_rate": {"normal": [0, 1]}}}, "normal is no distribution: write"),
        ({"space": {"train.learning_rate": {"uniform": [1e-6, 1e-5], "log": True}}}, "takes nothing beside it"),
        ({"space": {"train.learning_rate": {"uniform": [0.1, float("inf")]}}}, "is not two numbers"),
        ({"space": {"train.loss": [{"type": "sigmoid"}, {"type": ["ipo"]}]}}, "train.loss"),
        (
            {"space": {"train.epochs": list(range(1, 200)), "train.seed": list(range(200))}},
            "more than 10000 combinations",
        ),
        ({"space": {"train.loss.ld_alpha": [0.1, 0.5]}, "rank_by": "margin"}, "tail of weight"),
        (
            {"space": {"data.max_completion_tokens": [8, 256]}, "rank_by": "chosen_logps"},
            "its values would be ranked, not what was learnt",
        ),
        ({"beta": [0.1], "scheduler": "pbt"}, "best.yaml could not"),
        ({"beta": [0.1], "scheduler": "hyperband"}, "fifo, asha, median"),
        ({"beta": [0.1], "search": "tpe"}, "needs tune.num_trials: set it to the number of trials"),
        ({"beta": [0.1], "num_trials": 4}, "goes with tune.search=random or tpe"),
        ({"beta": [0.1, 0.1]}, "has a value twice: name each once"),
        ({}, "names nothing to search"),
    ],
)
def test_a_search_that_cannot_be_is_refused_and_told_how(tune: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        require_space(config(tune))


def test_quantized_weights_have_a_reference_of_their_own():
    space = {"model.lora": [{"rank": 8}, {"rank": 8, "quantization": "nf4"}]}
    with pytest.raises(ConfigError, match="not the same in all options"):
        require_space(config({"space": space}, reference={"engine": "torch"}))
    alike = {"model.lora": [{"rank": rank, "quantization": "nf4"} for rank in (4, 8)]}
    require_space(config({"space": alike}, reference={"engine": "torch"}))


def test_likelihood_drop_needs_a_reference():
    with pytest.raises(ConfigError, match="rank by chosen_logps"):
        require_space(searched({"train.loss": LOSSES}, rank_by="likelihood_drop"))


def test_a_scheduler_needs_evaluations_on_the_way():
    with pytest.raises(ConfigError, match=r"train\.eval_every_steps is not set"):
        require_space(config({"beta": [0.1], "scheduler": "asha"}, train={}))


def test_a_part_of_the_held_out_prompts_is_said_once():
    with pytest.raises(ConfigError, match=r"Leave train\.eval_fraction out"):
        require_space(config({"beta": [0.1]}, train={"eval_fraction": 0.3}))


def test_without_the_section_the_way_to_write_it_is_told():
    plain = parse_config({"run": {"name": "x", "output": "o"}, "model": {"path": "m"}, "data": {"train": "d"}})
    with pytest.raises(ConfigError, match=r"add tune\.space"):
        require_space(plain)


def test_trials_that_agree_on_their_rows_share_them():
    made = searched({"train.loss": LOSSES, "train.learning_rate": [1e-6, 1e-5], "model.lora.rank": [4, 8]})
    # With reference scores, with mismatched completions too (kto), and without (orpo).
    assert sorted(key.partition("-")[0] for key in preparations(made)) == ["mismatched", "reference", "tokenized"]
    keys = {
        preparation_key(
            trial_config(made, {"train.loss": loss, **more, "model.lora.rank": rank, "train.learning_rate": "1e-06"})
        )
        for loss, more in (("sigmoid", {"train.loss[sigmoid].beta": 0.1}), ("ipo", {"train.loss[ipo].beta": 0.2}))
        for rank in ("4", "8")
    }
    assert len(keys) == 1 and keys <= set(preparations(made))


def test_each_value_that_changes_the_rows_is_prepared():
    made = searched(
        {"data.max_completion_tokens": [64, 128], "model.dtype": ["float32", "bfloat16"], "train.epochs": [1, 2]}
    )
    found = preparations(made)
    assert len(found) == 4
    assert {(c.data.max_completion_tokens, c.model.dtype) for c in found.values()} == {
        (64, "float32"),
        (64, "bfloat16"),
        (128, "float32"),
        (128, "bfloat16"),
    }
    for key, one in found.items():
        assert preparation_key(one) == key


def test_numbers_in_scientific_notation_are_numbers():
    # YAML 1.1 reads 1e-6, without a point, as text.
    made = searched({"train.learning_rate": {"loguniform": ["1e-6", "1e-4"]}, "train.weight_decay": ["1e-2", 0.1]})
    assert made.tune.space == {
        "train.learning_rate": Range("loguniform", 1e-6, 1e-4),
        "train.weight_decay": Choice((0.01, 0.1)),
    }
    with pytest.raises(ConfigError, match=r"has 1e-05 twice"):
        searched({"train.learning_rate": [1e-5, "1e-5"]})


def test_a_weight_of_a_measure_may_be_written_as_yaml_takes_for_text():
    assert config({"beta": [0.1], "rank_by": {"accuracy": 1, "likelihood_drop": "1e-3"}}).tune.rank_by == {
        "accuracy": 1.0,
        "likelihood_drop": 0.001,
    }
