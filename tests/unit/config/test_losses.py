"""The options of the losses: which there are, what each loss needs, and what a message about them says."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

from dpo_ray.config import parse_config
from dpo_ray.config.losses import AlphaDivergence, ForwardKL, Loss, ReverseKL, SigmoidLoss, WeightedLoss
from dpo_ray.errors import ConfigError

PER_PAIR = {"nll_weight": 0, "wpo": False}
PER_SUM = {**PER_PAIR, "ld_alpha": None}
# Every option with its default.
OPTIONS: dict[str, dict[str, Any]] = {
    "sigmoid": {"beta": 0.1, "label_smoothing": 0, "divergence": ReverseKL(type="reverse_kl"), **PER_SUM},
    "robust": {"beta": 0.1, "label_smoothing": 0.1, **PER_SUM},
    "hinge": {"beta": 0.1, **PER_SUM},
    "ipo": {"beta": 0.1, "log_ratio": "mean", **PER_SUM},
    "sigmoid_norm": {"beta": 5, "label_smoothing": 0, **PER_PAIR},
    "exo_pair": {"beta": 0.1, "label_smoothing": 1e-3, **PER_SUM},
    "nca_pair": {"beta": 0.01, **PER_SUM},
    "bco_pair": {"beta": 0.01, **PER_SUM},
    "sppo_hard": {"beta": 0.001, **PER_SUM},
    "aot": {"beta": 0.01, "label_smoothing": 0, "nll_weight": 0},
    "aot_unpaired": {"beta": 0.01, "label_smoothing": 0, "nll_weight": 0},
    "apo_zero": {"beta": 0.1, **PER_SUM},
    "apo_down": {"beta": 0.1, **PER_SUM},
    "discopop": {"beta": 0.05, "tau": 0.05, **PER_SUM},
    "simpo": {"beta": 2, "target_margin": 1, "nll_weight": 0},
    "orpo": {"odds_ratio_weight": 0.1},
    "cpo": {"beta": 0.1, "nll_weight": 1},
    "kto": {"beta": 0.1, "desirable_weight": 1, "undesirable_weight": 1, "nll_weight": 0},
    "r_dpo": {"beta": 0.1, "length_penalty": 0.05, **PER_PAIR},
    "dpop": {"beta": 0.1, "penalty_weight": 50, **PER_SUM},
}
# A value of each option that the losses that have it accept.
VALUES: dict[str, Any] = {
    "beta": 0.2,
    "label_smoothing": 0.1,
    "divergence": {"type": "js"},
    "log_ratio": "sum",
    "tau": 0.1,
    "target_margin": 0.5,
    "odds_ratio_weight": 0.2,
    "desirable_weight": 2.0,
    "undesirable_weight": 2.0,
    "length_penalty": 0.1,
    "penalty_weight": 5.0,
    "nll_weight": 0.2,
    "wpo": True,
    "ld_alpha": 0.5,
    "terms": [{"weight": 1.0, "loss": {"type": "hinge"}}],
}
LOSSES = [*OPTIONS, "weighted"]


def parse(type: str, **options: Any) -> Any:
    loss = {"type": type, **options}
    if type == "weighted":
        loss = {"terms": VALUES["terms"], **loss}
    tree = {"run": {"name": "r", "output": "o"}, "model": {"path": "m"}, "data": {"train": "t"}}
    return parse_config({**tree, "train": {"loss": loss}}).train.loss


def message(type: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(type, **options)
    return str(caught.value)


def terms(*losses: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"weight": 1, "loss": loss} for loss in losses]


def test_every_loss_is_tested_here():
    assert set(TypeAdapter(Loss).json_schema()["discriminator"]["mapping"]) == set(LOSSES)


@pytest.mark.parametrize("type", OPTIONS)
def test_every_option_has_its_default(type: str):
    parsed = parse(type)
    assert {name: getattr(parsed, name) for name in OPTIONS[type]} == OPTIONS[type]


@pytest.mark.parametrize("type", LOSSES)
def test_a_loss_takes_the_options_that_it_uses_and_refuses_every_other(type: str):
    known = {*OPTIONS.get(type, {"nll_weight", "terms"})}
    for option, value in VALUES.items():
        if option in known:
            others = {"log_ratio": "sum"} if (type, option) == ("ipo", "ld_alpha") else {}
            assert getattr(parse(type, **{option: value}, **others), option) is not None
        else:
            assert f"train.loss.{option} is not a known key" in message(type, **{option: value})


@pytest.mark.parametrize(
    ("flag", "losses"),
    [
        ("needs_reference", set(LOSSES) - {"simpo", "orpo", "cpo"}),
        ("couples_batch", {"aot", "aot_unpaired"}),
        ("accepts_unpaired", {"kto"}),
        ("needs_mismatched", {"kto"}),
        ("tracks_reward_mean", {"bco_pair"}),
        ("weights_by_policy", set()),
    ],
)
def test_a_loss_says_what_it_needs(flag: str, losses: set[str]):
    assert {type for type in LOSSES if getattr(parse(type), flag)} == losses


def test_the_weights_are_asked_for_by_their_options():
    assert parse("sigmoid", wpo=True).weights_by_policy
    assert parse("sigmoid", ld_alpha=0.5).token_tail_weight == 0.5
    assert {parse(type).token_tail_weight for type in LOSSES} == {None}


@pytest.mark.parametrize(
    ("losses", "flags"),
    [
        (("hinge", "sigmoid"), {"needs_reference"}),
        (("simpo", "cpo"), set()),
        (("simpo", "hinge"), {"needs_reference"}),
        (("hinge", "bco_pair"), {"needs_reference", "tracks_reward_mean"}),
        (("hinge", "kto"), {"needs_reference", "needs_mismatched"}),
        (("kto", "kto"), {"needs_reference", "needs_mismatched", "accepts_unpaired"}),
    ],
)
def test_a_weighted_sum_needs_what_its_terms_need(losses: tuple[str, ...], flags: set[str]):
    parsed = parse("weighted", terms=terms(*({"type": type} for type in losses)))
    names = ("needs_reference", "couples_batch", "accepts_unpaired", "needs_mismatched", "tracks_reward_mean")
    assert {name for name in names if getattr(parsed, name)} == flags
    assert not parsed.weights_by_policy and parsed.token_tail_weight is None


def test_a_weighted_sum_is_weighted_by_the_policy_if_a_term_is():
    assert parse("weighted", terms=terms({"type": "hinge"}, {"type": "hinge", "wpo": True})).weights_by_policy


def test_the_rewards_of_a_weighted_sum_are_those_of_bco_or_else_of_the_first_term():
    def rewarding(*types: str) -> str:
        return parse("weighted", terms=terms(*({"type": type} for type in types))).rewarding.type

    assert rewarding("sigmoid", "hinge") == "sigmoid"
    assert rewarding("sigmoid", "bco_pair") == "bco_pair"


@pytest.mark.parametrize(
    ("loss", "key", "value"),
    [
        *(({"type": type}, "beta", 0) for type in OPTIONS if type != "orpo"),
        ({"type": "sigmoid"}, "label_smoothing", 0.5),
        ({"type": "robust"}, "label_smoothing", 0.5),
        ({"type": "aot"}, "label_smoothing", -0.1),
        ({"type": "exo_pair"}, "label_smoothing", 0),
        ({"type": "sigmoid"}, "nll_weight", -1),
        ({"type": "sigmoid"}, "ld_alpha", 1.1),
        ({"type": "ipo"}, "log_ratio", "max"),
        ({"type": "discopop"}, "tau", 0),
        ({"type": "simpo"}, "target_margin", -1),
        ({"type": "orpo"}, "odds_ratio_weight", 0),
        ({"type": "kto"}, "desirable_weight", 0),
        ({"type": "r_dpo"}, "length_penalty", 0),
        ({"type": "dpop"}, "penalty_weight", 0),
    ],
)
def test_a_value_out_of_range_is_told_with_its_key(loss: dict[str, Any], key: str, value: Any):
    assert f"train.loss.{key}={value!r}: " in message(**loss, **{key: value})


def test_the_divergence_is_chosen_by_its_type():
    assert parse("sigmoid", divergence={"type": "forward_kl"}).divergence == ForwardKL(type="forward_kl")
    assert parse("sigmoid", divergence={"type": "alpha"}).divergence == AlphaDivergence(type="alpha", alpha=0.5)


@pytest.mark.parametrize(
    ("divergence", "said"),
    [
        ({"type": "alpha", "alpha": 1}, "train.loss.divergence.alpha=1: "),
        ({"type": "js", "alpha": 0.5}, "train.loss.divergence.alpha is not a known key"),
        ({"type": "alpha", "alhpa": 0.5}, "train.loss.divergence.alhpa is not a known key; did you mean alpha?"),
        ({"type": "kl"}, "train.loss.divergence.type='kl' is not known here (known here: reverse_kl, forward_kl, js, "),
        ({}, "train.loss.divergence.type is missing: add it to the file or pass -o train.loss.divergence.type="),
    ],
)
def test_a_mistake_in_the_divergence_is_told_with_its_key(divergence: dict[str, Any], said: str):
    assert said in message("sigmoid", divergence=divergence)


def test_an_unknown_loss_is_told_with_the_known_ones():
    said = message("dpo")
    assert "train.loss.type='dpo' is not known here" in said
    assert all(type in said for type in LOSSES)


def test_a_tail_weight_needs_a_sum():
    said = message("ipo", ld_alpha=0.5)
    assert "train.loss: ld_alpha=0.5" in said and "set log_ratio to sum" in said
    assert parse("ipo", ld_alpha=0.5, log_ratio="sum").token_tail_weight == 0.5


@pytest.mark.parametrize(
    ("term", "said"),
    [
        ({"weight": 1, "loss": {"type": "hinge", "beta": 0}}, "train.loss.terms[1].loss.beta=0: "),
        ({"weight": 0, "loss": {"type": "hinge"}}, "train.loss.terms[1].weight=0: "),
        ({"weight": 1, "loss": {"type": "robust", "label_smothing": 0.1}}, "terms[1].loss.label_smothing is not"),
        ({"weight": 1, "loss": {"type": "robust", "label_smothing": 0.1}}, "; did you mean label_smoothing?"),
        ({"weight": 1, "loss": {"type": "hinge", "label_smoothing": 0.1}}, "(known here: type, wpo, ld_alpha, nll"),
        (
            {"wieght": 1, "loss": {"type": "hinge"}},
            "train.loss.terms[1].wieght is not a known key; did you mean weight?",
        ),
        ({"loss": {"type": "hinge"}}, "train.loss.terms[1].weight is missing: add it to the file"),
        ({"weight": 1, "loss": {}}, "train.loss.terms[1].loss.type is missing: add it to the file"),
        ({"weight": 1, "loss": {"type": "weighted", "terms": []}}, "terms[1].loss.type='weighted' is not known here"),
        ({"weight": 1, "loss": {"type": "aot"}}, "terms[1].loss.type='aot' is not known here"),
        ({"weight": 1, "loss": {"type": "aot_unpaired"}}, "terms[1].loss.type='aot_unpaired' is not known here"),
        ({"weight": 1, "loss": {"type": "ipo", "ld_alpha": 0.5}}, "train.loss.terms[1].loss: ld_alpha=0.5"),
        ({"weight": 1, "loss": {"type": "hinge", "ld_alpha": 0.5}}, "train.loss: terms[1].loss.ld_alpha=0.5 would"),
        (
            {"weight": 1, "loss": {"type": "sigmoid", "divergence": {"type": "alpha", "alpha": 1}}},
            "train.loss.terms[1].loss.divergence.alpha=1: ",
        ),
    ],
)
def test_a_mistake_in_a_term_is_told_with_the_place_of_the_term(term: dict[str, Any], said: str):
    found = message("weighted", terms=[*terms({"type": "hinge"}), term])
    assert said in found
    # A list is out of an override's reach.
    assert "-o train" not in found


def test_a_weighted_sum_has_terms_and_one_running_mean():
    assert "train.loss: terms is empty" in message("weighted", terms=[])
    assert "bco_pair more than once" in message("weighted", terms=terms({"type": "bco_pair"}, {"type": "bco_pair"}))


def test_a_weighted_sum_reads_its_terms():
    parsed = parse("weighted", terms=[{"weight": 0.8, "loss": {"type": "sigmoid"}}], nll_weight=1)
    assert isinstance(parsed, WeightedLoss)
    assert parsed.terms[0].weight == 0.8 and parsed.terms[0].loss == SigmoidLoss(type="sigmoid")
    assert parsed.nll_weight == 1


@pytest.mark.parametrize("type", LOSSES)
def test_the_options_load_again_from_what_they_are_written_as(type: str):
    parsed = parse(type)
    written = parsed.model_dump(mode="json")
    assert next(iter(written)) == "type"
    assert TypeAdapter(Loss).validate_python(written) == parsed
