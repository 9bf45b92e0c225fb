"""Which loss when: formulas from dpo_ray/losses/formulas.py, options and costs from dpo_ray/config/losses.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

from dpo_ray.config.losses import (
    Judged,
    Loss,
    LossOptions,
    NLLTerm,
    PolicyWeighting,
    TailWeighting,
    WeightedLoss,
    losses_using,
)
from dpo_ray.losses import formulas
from dpo_ray.losses.objective import zero_margin_loss

_FORMULAS = {
    "aot": "sigmoid_loss",
    "aot_unpaired": "sigmoid_loss",
    "cpo": "sigmoid_loss",
    "sigmoid_norm": "sigmoid_loss",
    "weighted": None,
}
"""Types whose formula is not the function TYPE_loss; None: it is none of its own."""
REASONS = {
    "sigmoid": "the first to try: clean pairs, a reference, nothing special",
    "robust": "labels that are known to be flipped at some rate",
    "hinge": "pairs that are told apart should no longer count",
    "ipo": "few or certain pairs, on which DPO drifts far from the reference",
    "sigmoid_norm": "answers of very different length; as Tulu 3 does",
    "exo_pair": "a reverse KL to the label, which seeks one mode",
    "nca_pair": "chosen answers must not become less likely",
    "bco_pair": "answers are good or bad by themselves; mostly as a term of a sum",
    "sppo_hard": "rounds of self-play, with pairs of the policy's own answers",
    "aot": "the distribution of margins matters more than single pairs",
    "aot_unpaired": "good and bad answers that belong to no pairs, as many of either",
    "apo_zero": "chosen answers are better than what the policy says",
    "apo_down": "chosen answers are worse than what the policy says",
    "discopop": "to try beside sigmoid: a loss found by search",
    "simpo": "no room or time for a reference; lengths must not pay",
    "orpo": "from a base model, tuning and preference in one, without a reference",
    "cpo": "chosen answers are good enough to imitate, without a reference",
    "kto": "single answers with a thumb up or down",
    "r_dpo": "sigmoid makes answers longer",
    "dpop": "sigmoid makes chosen answers less likely, as where the two differ in few tokens",
    "weighted": "more than one aim, such as MPO's sum",
}
"""Type → what speaks for it."""
_GROUPS = {
    "Pairs against a reference": lambda loss: not _special(loss),
    "Pairs that are coupled over the batch": lambda loss: loss.couples_batch,
    "Pairs or single answers": lambda loss: loss.accepts_unpaired,
    "Without a reference": lambda loss: not loss.needs_reference,
}
_SHARED = (NLLTerm, TailWeighting, PolicyWeighting)
_HEAD = """\
# Losses

Made by `make docs` from `dpo_ray/config/losses.py` and `dpo_ray/losses/formulas.py`. `train.loss` has the type and its
options; each takes only its own, and any other is an error. Not sure? Begin with `sigmoid`, β = 0.1.

Symbols: Δ is the log-ratio of an answer, log π(y) − log π_ref(y), Δ_w of the chosen and Δ_l of the rejected one; h is
the margin Δ_w − Δ_l; a is an answer's mean token log-prob under the policy; σ is the logistic function. Log-probs are
in nats. **At the start** is the loss while policy and reference are equal, by the defaults: the first step is checked
against it.

What is logged as reward is what the loss sees, so rewards of different losses or β do not compare; accuracies do.
"""


def page() -> str:
    """Markdown of all losses."""
    kinds = _kinds()
    lines = [_HEAD, "## Which when", "", "| type | when | costs |", "|---|---|---|"]
    for title, among in _GROUPS.items():
        lines.append(f"| **{title}** | | |")
        for name, kind in kinds.items():
            if among(_least(kind)):
                lines.append(f"| [`{name}`](#{name}) | {REASONS[name]} | {_costs(kind)} |")
    lines.append(f"| [`weighted`](#weighted) | {REASONS['weighted']} | {_costs(WeightedLoss)} |")
    lines += ["", *_judged(), "", "## Options that many have", "", "| option | default | |", "|---|---|---|"]
    lines += [line for kind in _SHARED for line in _options(kind, list(kind.__annotations__))]
    lines += ["", "`wpo` costs a sum over the vocabulary for each token; the other two cost nothing.", ""]
    for name, kind in {**kinds, "weighted": WeightedLoss}.items():
        lines += [f"## {name}", "", _about(kind), "", *_formula(name)]
        if kind is not WeightedLoss and (value := zero_margin_loss(kind(type=name))) is not None:
            lines += [f"At the start: {value:.6g}.", ""]
        shared = [name for name in _shared() if kind.model_fields.get(name) is not None and not _own(kind, name)]
        own = [name for name in kind.model_fields if name != "type" and name not in shared]
        if own:
            lines += ["| option | default | |", "|---|---|---|", *_options(kind, own), ""]
        if shared:
            lines += [f"As many have them: {', '.join(f'`{name}`' for name in shared)}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _special(loss: LossOptions) -> bool:
    return loss.couples_batch or loss.accepts_unpaired or not loss.needs_reference


def _kinds() -> dict[str, type[LossOptions]]:
    """Type → the class of its options, the sum left aside."""
    union, _ = get_args(Loss)
    kinds = {get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(union)}
    return {name: kind for name, kind in kinds.items() if kind is not WeightedLoss}


def _least(kind: type[LossOptions]) -> Any:
    return kind(type=get_args(kind.model_fields["type"].annotation)[0])


def _about(kind: type[LossOptions]) -> str:
    """What it is, with links to its papers."""
    return _linked(kind.model_fields["type"].description or "")


def _linked(text: str) -> str:
    return re.sub(r"(?:arXiv:)?\b(\d{4}\.\d{5})\b", r"[arXiv:\1](https://arxiv.org/abs/\1)", " ".join(text.split()))


def _formula(name: str) -> Iterator[str]:
    """The first paragraph of the function's docstring: the formula is written there once."""
    function = _FORMULAS.get(name, f"{name}_loss")
    if function is None:
        return
    told = " ".join((getattr(formulas, function).__doc__ or "").split("\n\n")[0].split())
    if name in _FORMULAS:
        first = told.partition(" (")[0].rstrip(",.")
        seen = {"cpo": "h of summed policy log-probs", "sigmoid_norm": "h of means per token"}
        what = seen.get(name, "h of the sorted differences (`aot_margins`)")
        told = f"{first.removeprefix('DPO, ')}, with {what}."
    yield f"> {_linked(told)}"
    yield ""


def _costs(kind: type[LossOptions]) -> str:
    if kind is WeightedLoss:
        return "those of its terms"
    loss = _least(kind)
    said = ["a reference pass"] if loss.needs_reference else ["no reference pass"]
    said += ["mismatched answers, scored by the reference and in each step"] if loss.needs_mismatched else []
    said += ["a second forward pass in each step"] if loss.couples_batch else []
    said += ["a running mean in the checkpoint"] if loss.tracks_reward_mean else []
    return "; ".join(said)


def _shared() -> list[str]:
    return [name for kind in _SHARED for name in kind.__annotations__]


def _own(kind: type[LossOptions], name: str) -> bool:
    """Whether a loss says something of its own about an option that many have."""
    return name in kind.__annotations__


def _options(kind: type[LossOptions], names: list[str]) -> Iterator[str]:
    for name in names:
        field = kind.model_fields[name]
        default = field.get_default()
        shown = "required" if field.is_required() else f"`{_plain(getattr(default, 'type', default))}`"
        about = _linked(field.description or "").replace("|", r"\|")
        yield f"| `{name}` | {shown} | {about} |"


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _judged() -> Iterator[str]:
    yield "Rows may say how a pair [was judged](data.md#pairs-that-are-not-all-alike):"
    yield ""
    for column in get_args(Judged):
        using = losses_using(column)
        others = [name for name in _kinds() if name not in using]
        fewer, before = (others, "all but ") if len(others) < len(using) else (using, "")
        yield f"- `{column}`: {before}{', '.join(f'`{name}`' for name in fewer)}."
