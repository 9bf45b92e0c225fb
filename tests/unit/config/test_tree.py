"""The configuration tree: what loads, what fails, and what the message says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_ray.config import Config, Train, dump_config, load_config, parse_config
from dpo_ray.config.losses import HingeLoss, IPOLoss, RobustLoss, SigmoidLoss
from dpo_ray.config.yaml_text import read_yaml
from dpo_ray.errors import ConfigError

REPOSITORY = Path(__file__).parents[3]


def tree(**sections: Any) -> dict[str, Any]:
    """The least that loads, with sections laid over it."""
    return {"run": {"name": "r", "output": "out"}, "model": {"path": "m"}, "data": {"train": "t.parquet"}, **sections}


def message(broken: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(broken)
    return str(caught.value)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree(train={"loss": {"type": "sigmoid", "beta": 0.1}})))
    return path


def test_the_smallest_tree_loads_with_defaults():
    config = parse_config(tree())
    assert config.train.loss == SigmoidLoss(type="sigmoid", beta=0.1, label_smoothing=0.0)
    assert config.train.learning_rate == 1e-6
    assert config.generate is None and config.tune is None


def test_the_tree_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse_config(tree()).train.epochs = 2


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        ({"train": {"lerning_rate": 1e-6}}, "train.lerning_rate", "learning_rate"),
        ({"run": {"name": "r", "output": "o", "sed": 1}}, "run.sed", "seed"),
        ({"trian": {}}, "trian", "train"),
        ({"evaluate": {"win_rate": {"samplng": {}}}}, "evaluate.win_rate.samplng", "sampling"),
        ({"publish": {"gate": {"acuracy_above": 0.5}}}, "publish.gate.acuracy_above", "accuracy_above"),
    ],
)
def test_an_unknown_key_fails_with_the_key_that_was_meant(section: dict[str, Any], key: str, meant: str):
    assert f"{key} is not a known key; did you mean {meant}?" in message(tree(**section))


def test_an_unknown_key_like_no_other_fails_with_the_known_ones():
    said = message(tree(publish={"zzz": 1}))
    assert "publish.zzz is not a known key" in said and "gate" in said


def test_a_missing_key_is_named_with_the_override_that_adds_it():
    broken = tree()
    del broken["run"]["output"]
    said = message(broken)
    assert "run.output is missing" in said and "-o run.output=" in said


def test_every_problem_is_told_at_once():
    said = message(tree(train={"epochs": 0, "global_batch_size": 0}))
    assert "train.epochs=0" in said and "train.global_batch_size=0" in said


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "hinge", "ipo"])
@pytest.mark.parametrize("beta", [0, -0.1])
def test_beta_must_be_positive_in_every_loss(loss: str, beta: float):
    assert f"beta={beta}" in message(tree(train={"loss": {"type": loss, "beta": beta}}))


@pytest.mark.parametrize(
    "train",
    [
        {"learning_rate": 0},
        {"learning_rate": -1e-6},
        {"learning_rate": "fast"},
        {"warmup_fraction": 1.0},
        {"weight_decay": -0.1},
        {"max_grad_norm": 0},
        {"global_batch_size": 0},
        {"epochs": 1.5},
        {"num_workers": 0},
        {"schedule": "step"},
        {"max_failures": -1},
        {"loss": {"type": "sigmoid", "label_smoothing": 0.5}},
        {"loss": {"type": "robust", "label_smoothing": 0.5}},
        {"loss": {"type": "dpo"}},
    ],
)
def test_a_value_out_of_range_fails_with_its_key_and_value(train: dict[str, Any]):
    key, value = next(iter(train.items()))
    said = message(tree(train=train))
    assert f"train.{key}" in said
    shown = next(reversed(value.values())) if isinstance(value, dict) else value
    assert repr(shown) in said


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    "section", [lambda x: {"learning_rate": x}, lambda x: {"loss": {"type": "sigmoid", "beta": x}}]
)
def test_a_number_that_is_not_finite_fails(section: Any, value: float):
    message(tree(train=section(value)))


@pytest.mark.parametrize("loss", ["hinge", "ipo"])
def test_an_option_that_the_loss_does_not_use_is_an_error(loss: str):
    said = message(tree(train={"loss": {"type": loss, "label_smoothing": 0.1}}))
    assert "label_smoothing is not a known key" in said and "beta" in said


def test_a_mistyped_loss_option_is_told_by_the_key_that_the_file_has():
    said = message(tree(train={"loss": {"type": "sigmoid", "label_smothing": 0.1}}))
    assert "did you mean label_smoothing?" in said
    assert "train.loss.label_smothing" in said


@pytest.mark.parametrize(
    ("loss", "expected"), [("sigmoid", SigmoidLoss), ("robust", RobustLoss), ("hinge", HingeLoss), ("ipo", IPOLoss)]
)
def test_the_type_chooses_the_loss(loss: str, expected: type):
    assert type(parse_config(tree(train={"loss": {"type": loss}})).train.loss) is expected


@pytest.mark.parametrize("name", ["", "a b", "../up", "-x", "a" * 64, "a/b"])
def test_a_run_name_that_is_no_folder_name_fails(name: str):
    assert "run.name" in message(tree(run={"name": name, "output": "out"}))


@pytest.mark.parametrize("reward", ["module", "module:", ":f", "a b:f", "m:f()"])
def test_a_reward_that_is_not_module_colon_function_fails(reward: str):
    assert "generate.reward[0].function=" in message(tree(data={}, generate={"prompts": "p.jsonl", "reward": reward}))


def test_pairs_need_exactly_one_origin():
    assert "neither is given" in message(tree(data={}))
    assert "both is given" in message(tree(generate={"prompts": "p.jsonl"}))


def test_columns_are_named_by_field():
    columns = parse_config(tree(data={"train": "t", "columns": {"prompt": "question"}})).data.columns
    assert columns.renamed() == {"prompt": "question"}
    said = message(tree(data={"train": "t", "columns": {"promt": "question"}}))
    assert "data.columns.promt is not a known key; did you mean prompt?" in said


def test_a_column_is_one_field():
    said = message(tree(data={"train": "t", "columns": {"chosen": "a", "rejected": "a"}}))
    assert "data.columns.chosen and data.columns.rejected both name the column 'a'" in said


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"layout": "paired", "pairing": {"pairs_per_prompt": 2}}, "data.pairing is for ranked rows"),
        ({"layout": "unpaired", "columns": {"chosen": "a"}}, "data.columns.chosen=a"),
        ({"layout": "implicit_prompt", "columns": {"prompt": "a"}}, "data.columns.prompt=a"),
        ({"layout": "ranking"}, "data.layout: 'ranking' is no format; name one of auto, alpaca"),
        ({"pairing": {"min_score_gap": 0}}, "data.pairing.min_score_gap=0"),
        ({"pairing": {"pairs": 2}}, "data.pairing.pairs is not a known key"),
        ({"eval": "e", "held_out_fraction": 0.2}, "data.held_out_fraction=0.2 holds out prompts of data.train, but"),
    ],
)
def test_options_that_mean_nothing_to_the_data_fail(data: dict[str, Any], said: str):
    assert said in message(tree(data={"train": "t", **data}))


def test_options_of_the_layouts_that_are_there_pass():
    data = parse_config(
        tree(data={"train": "t", "columns": {"label": "good"}, "pairing": {"pairs_per_prompt": 2}})
    ).data
    data.require_used({"unpaired", "ranked"})
    with pytest.raises(ConfigError, match=r"data\.columns\.label=good .* paired and ranked rows"):
        data.require_used({"paired", "ranked"})
    with pytest.raises(ConfigError, match=r"data\.pairing .* these are unpaired"):
        data.require_used({"unpaired"})


@pytest.mark.parametrize(
    ("layout", "more"),
    [("nectar", {"pairing": {"pairs_per_prompt": 2}}), ("kto_messages", {"columns": {"label": "good"}})],
)
def test_options_go_with_every_format_that_has_a_use_for_them(layout: str, more: dict[str, Any]):
    assert parse_config(tree(data={"train": "t", "layout": layout, **more})).data.layout == layout


def test_the_resolved_tree_of_named_data_loads_again():
    config = parse_config(tree(data={"train": "t", "eval": "e", "layout": "paired"}))
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize("key", ["layout", "columns", "pairing", "loss_turns"])
def test_options_of_read_rows_do_not_go_with_generated_ones(key: str):
    options = {"columns": {"prompt": "a"}, "pairing": {"pairs_per_prompt": 2}, "loss_turns": "last"}
    value = {"layout": "ranked", **options}[key]
    assert f"data.{key} is about the rows" in message(tree(data={key: value}, generate={"prompts": "p.jsonl"}))


def test_prompts_that_are_sampled_for_are_not_cut():
    cut = tree(data={"long_prompts": "keep_end"}, generate={"prompts": "p.jsonl"})
    assert "data.long_prompts=keep_end goes with data.train" in message(cut)
    assert parse_config(tree(data={"train": "t.parquet", "long_prompts": "keep_end"})).data.long_prompts == "keep_end"


def test_held_out_pairs_do_not_go_with_generated_ones():
    assert "data.eval" in message(tree(data={"eval": "e.parquet"}, generate={"prompts": "p.jsonl"}))


def test_a_single_sample_makes_no_pair():
    assert "samples is 1" in message(tree(data={}, generate={"prompts": "p.jsonl", "sampling": {"samples": 1}}))


def test_every_worker_needs_a_pair():
    said = message(tree(train={"global_batch_size": 3, "num_workers": 4}))
    assert "train.global_batch_size is 3" in said and "4 workers" in said
    assert parse_config(tree(train={"global_batch_size": 4, "num_workers": 4})).train.num_workers == 4


def test_a_gate_on_the_win_rate_needs_the_win_rate():
    gate = {"gate": {"win_rate_above": 0.5}}
    assert "evaluate.win_rate" in message(tree(publish=gate))
    assert parse_config(tree(publish=gate, evaluate={"win_rate": {}})).publish.gate.win_rate_above == 0.5


def test_overrides_lie_over_the_file(config_file: Path):
    config = load_config(config_file, ["train.loss.beta=0.3", "run.name=other", "evaluate.win_rate.max_prompts=7"])
    assert config.train.loss.beta == 0.3
    assert config.run.name == "other"
    assert config.evaluate.win_rate is not None and config.evaluate.win_rate.max_prompts == 7


def test_an_override_in_scientific_notation_is_a_number(config_file: Path):
    # YAML 1.1 reads 1e-6, without a point, as text.
    assert load_config(config_file, ["train.learning_rate=1e-6"]).train.learning_rate == 1e-6


def test_an_override_may_be_null_or_a_list(config_file: Path):
    config = load_config(config_file, ["publish.gate.accuracy_above=null", "tune.beta=[0.1, 0.2]"])
    assert config.publish.gate.accuracy_above is None
    assert config.tune is not None and config.tune.beta == (0.1, 0.2)


def test_data_is_one_path_or_several(config_file: Path):
    config = load_config(config_file, ["data.train=[a, 'b/*.jsonl.gz']"])
    assert config.data.train == ("a", "b/*.jsonl.gz")
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize("value", ["", [], 3, {"a": "b"}, [1]])
def test_data_that_is_no_path_fails_with_the_key(value: Any):
    assert f"data.train: {value!r} is no path; name a file, a folder or a glob" in message(tree(data={"train": value}))


def test_the_last_of_two_overrides_wins(config_file: Path):
    assert load_config(config_file, ["run.seed=1", "run.seed=2"]).run.seed == 2


def test_a_value_may_hold_an_equals_sign(config_file: Path):
    assert load_config(config_file, ["data.train=s3://b/x?region=eu"]).data.train == "s3://b/x?region=eu"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.epochs", "dotted.key=value"),
        ("=1", "dotted.key=value"),
        ("run.name.first=x", "name is a value, not a section, so that no key below it can be set. Check the key"),
        ("train.epochs=[", "not valid YAML"),
        ("train.epoch=2", "did you mean epochs?"),
        ("train={epochs: 2, epochs: 3}", "epochs stands twice"),
    ],
)
def test_an_override_that_cannot_be_applied_says_why(config_file: Path, override: str, said: str):
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, [override])
    assert said in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nope\.yaml"):
        load_config(tmp_path / "nope.yaml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"run: [", r"not valid YAML .*line 1, column 7.*Mend it at the line"),
        (b"- a\n", "holds list and no sections: write a mapping"),
        (b"", "holds NoneType and no sections: write a mapping"),
        (
            b"run: {name: n}\ntrain:\n  epochs: 2\ntrain:\n  learning_rate: 1e-6\n",
            "train stands twice, first in line 2: put what is below both under one.* line 4",
        ),
        (b"train:\n  epochs: 2\n  beta: 1\n  epochs: 3\n", "epochs stands twice, first in line 2.* line 4"),
        (b"\xff\xfe\x00", "cannot be read .*Name a text file in UTF-8"),
    ],
)
def test_a_file_that_is_no_mapping_fails(tmp_path: Path, content: bytes, said: str):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        load_config(path)


def test_what_is_merged_may_be_said_again(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "run: {name: n, output: o}\nmodel: {path: m}\ndata: {train: t}\n"
        "train:\n  <<: &common {epochs: 2, learning_rate: 1e-5}\n  epochs: 3\n"
    )
    train = load_config(path).train
    assert (train.epochs, train.learning_rate) == (3, 1e-5)
    nested = "b: &B {x: 0, y: 2}\nbase:\n  inner: &A\n    <<: *B\n    x: 1\nc:\n  <<: *A\n  z: 3\n"
    assert read_yaml(nested)["c"] == {"x": 1, "y": 2, "z": 3}
    assert read_yaml("{1: a, '1': b}") == {1: "a", "1": "b"}


def test_yaml_cannot_construct_objects(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(path)


def test_the_resolved_configuration_loads_to_itself(tmp_path: Path):
    config = parse_config(tree(tune={"beta": [0.1]}, evaluate={"win_rate": {}}, train={"learning_rate": 5e-7}))
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize("path", sorted((REPOSITORY / "pipelines" / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_what_a_job_is_submitted_with_and_a_run_keeps_loads_again(path: Path):
    config = load_config(path)
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_the_resolved_tree_of_a_hook_loads_again():
    hooks = {"on_success": {"command": ["tell"]}, "on_error": {"url_env": "ALERTS", "max_retries": 2}}
    config = parse_config(tree(run={"name": "r", "output": "out", "hooks": hooks}))
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize("override", ["data.since=2026-13-02", "data.until=2026-02-30"])
def test_a_date_that_there_is_not_is_refused(config_file: Path, override: str):
    with pytest.raises(ConfigError, match=rf"-o {override}: no such date .*as in 2026-11-01"):
        load_config(config_file, [override])
    key, _, value = override.rpartition(".")[2].partition("=")
    config_file.write_text(f"data: {{train: t, {key}: {value}}}")
    with pytest.raises(ConfigError, match="holds a date that there is not"):
        load_config(config_file)


@pytest.mark.parametrize("value", ["20261101", "0", "1793491200", "2026"])
def test_a_number_is_no_day(config_file: Path, value: str):
    with pytest.raises(ConfigError, match=rf"data\.since: {value} is a number, .*: write it as in 2026-11-01"):
        load_config(config_file, [f"data.since={value}"])


@pytest.mark.parametrize("path", sorted((REPOSITORY / "pipelines" / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_configuration_loads(path: Path):
    assert isinstance(load_config(path), Config)


@pytest.mark.parametrize(
    ("option", "value", "changes"),
    [
        ("learning_rate", 2e-6, True),
        ("loss", {"type": "hinge"}, True),
        ("global_batch_size", 32, True),
        ("epochs", 2, True),
        ("num_workers", 2, False),
        ("tokens_per_microbatch", 1, False),
        ("use_gpu", True, False),
        ("eval_fraction", 0.5, True),
        ("checkpoint_every_steps", 1, False),
    ],
)
def test_identity_holds_what_changes_the_result_and_nothing_else(option: str, value: Any, changes: bool):
    assert (Train.model_validate({option: value}).identity() != Train().identity()) is changes


@pytest.mark.parametrize("key", ["sync_ref_model", "ref_model_sync_steps"])
def test_who_asks_for_a_refreshed_reference_is_told_of_rounds(key: str):
    with pytest.raises(ConfigError, match=rf"train\.{key} is not a known key.*between rounds.*model\.path"):
        parse_config(tree(train={key: 1}))


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ({"keep_best": "eval_loss"}, "train.keep_best goes by eval_loss.*train.eval_every_steps"),
        ({"early_stopping": {}}, "train.early_stopping goes by eval_loss.*train.eval_every_steps"),
        ({"min_workers": 3, "num_workers": 2}, "train.min_workers is 3, more than train.num_workers=2"),
        ({"eval_fraction": 0.5}, "train.eval_fraction is of the evaluations while training, and there are none: set"),
        ({"eval_pairs": 5}, "train.eval_pairs is of the evaluations while training"),
    ],
)
def test_combinations_in_train_that_cannot_work(train: dict[str, object], told: str):
    with pytest.raises(ConfigError, match=told):
        parse_config(tree(train=train))


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (
            {"sharding": {"workers": 2}, "num_workers": 4},
            r"train\.sharding\.workers is 2, but train\.strategy is ddp.*fsdp",
        ),
        ({"sharding": {"keep_gathered": True}}, r"train\.sharding\.keep_gathered is True.*leave train\.sharding out"),
        (
            {"strategy": "fsdp", "sharding": {"workers": 3}, "num_workers": 4},
            r"workers is 3, which does not divide.*=4",
        ),
        (
            {"strategy": "fsdp", "sharding": {"workers": 2}, "num_workers": 4, "min_workers": 2},
            r"workers is 2, but with train\.min_workers=2.*leave one of the two out",
        ),
        (
            {"strategy": "fsdp", "sharding": {"prefetch_layers": 1}},
            r"prefetch_layers is 1, but train\.use_gpu is false",
        ),
    ],
)
def test_sharding_that_means_nothing_is_refused(train: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        parse_config(tree(train=train))


def test_a_part_of_a_gpu_is_for_one_worker():
    assert Train.model_validate({"use_gpu": True, "gpus_per_worker": 0.5}).gpus == 0.5
    assert Train().gpus == 0.0 and Train.model_validate({"use_gpu": True}).gpus == 1.0
    for train in ({"gpus_per_worker": 0.5}, {"gpus_per_worker": 0.5, "use_gpu": True, "num_workers": 2}):
        with pytest.raises(ConfigError, match=r"train\.gpus_per_worker is 0\.5.*cannot share a GPU"):
            parse_config(tree(train=train))


def test_benchmark_tasks_are_named_once_each():
    tasks = parse_config(tree(evaluate={"tasks": {"names": ["arc_easy", "mmlu"]}})).evaluate.tasks
    assert tasks is not None and tasks.names == ("arc_easy", "mmlu") and tasks.num_fewshot is tasks.limit is None
    assert "arc_easy twice" in message(tree(evaluate={"tasks": {"names": ["arc_easy", "mmlu", "arc_easy"]}}))
    assert "evaluate.tasks.names" in message(tree(evaluate={"tasks": {"names": []}}))
    assert "evaluate.tasks.limit" in message(tree(evaluate={"tasks": {"names": ["mmlu"], "limit": 0}}))
    assert "num_fewshot" in message(tree(evaluate={"tasks": {"names": ["mmlu"], "num_fewshots": 5}}))
