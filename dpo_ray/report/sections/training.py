"""Training: its curves, those of held-out pairs on the same axes, and what each source of a mixture had of it."""

from __future__ import annotations

from dpo_ray.report.charts import curves
from dpo_ray.report.document import Block, Paragraph, Section, Table
from dpo_ray.report.facts import Facts
from dpo_ray.report.shown import duration, estimate, number

_PLOTTED = {
    "loss": ("Loss", "nats", "What is minimised; its height depends on β and on the loss, so runs compare only alike."),
    "rewards/accuracies": (
        "Accuracy",
        "share of pairs",
        "Pairs whose chosen answer has the higher reward. Training far over held out: pairs are learnt by heart.",
    ),
    "rewards/margins": (
        "Margin",
        "reward",
        "Reward of chosen less that of rejected, as the loss sees it: scaled by β.",
    ),
    "rewards/chosen": (
        "Reward of chosen",
        "reward",
        "Below 0 the chosen answers have become less likely than they were under the reference.",
    ),
    "rewards/rejected": ("Reward of rejected", "reward", "It should fall, and faster than that of chosen."),
    "logps/chosen": ("Log-probability of chosen", "nats an answer", "Its sum over the tokens of an answer."),
    "grad_norm": ("Norm of the gradient", "norm", "Before it is clipped. Spikes come before what diverges."),
    "learning_rate": ("Learning rate", "rate", "As the schedule had it."),
    "tokens_per_second": ("Tokens a second", "tokens/s", "Of all workers together."),
}


def training_section(facts: Facts) -> Section | None:
    found = facts.curves
    charts = [
        curves(title, says, found.trained.get(name), found.held_out.get(name), unit)
        for name, (title, unit, says) in _PLOTTED.items()
    ]
    blocks: list[Block] = [chart for chart in charts if chart is not None]
    train = facts.summary.get("train") or {}
    if not blocks and not train:
        return None
    head = [Paragraph(text) for text in _said(facts) if text]
    return Section("training", "Training", [*head, *blocks, *_sources(facts)])


def _said(facts: Facts) -> list[str]:
    train, curves_ = facts.summary.get("train") or {}, facts.curves
    texts = []
    if "num_steps" in train:
        took = f" in {duration(train['seconds'])}" if train.get("seconds") else ""
        rate = f", {number(train['tokens_per_second'])} tokens a second" if train.get("tokens_per_second") else ""
        planned = train.get("planned_steps")
        of = f" of {planned:,} that were planned" if planned not in {None, train["num_steps"]} else ""
        kept = train.get("published_step")
        of_step = f" The weights of step {kept:,} were kept." if kept not in {None, train["num_steps"]} else ""
        texts.append(f"{train['num_steps']:,} steps{of}{took}{rate}.{of_step}")
    ended = any(name.split(" ")[0] == "train" for name in facts.summary.get("stages") or ())
    if not train and not ended and curves_.trained:
        last = max(curve.steps[-1] for curve in curves_.trained.values())
        texts.append(f"Training did not come to its end. The curves go up to step {last:,}, the last one it told of.")
    if train.get("first_step_loss") is not None and train.get("zero_margin_loss") is not None:
        texts.append(
            f"The loss of the first step was {train['first_step_loss']:.4f}, where a policy equal to the reference has "
            f"{train['zero_margin_loss']:.4f}."
        )
    if any(curve.is_thinned for curve in curves_.trained.values()):
        most = max(curve.num_points for curve in curves_.trained.values())
        texts.append(
            f"Each point stands for several of {most:,} steps: their mean, and as a band their smallest and largest. "
            "metrics.jsonl has all."
        )
    if curves_.trained and not curves_.held_out:
        texts.append("Held-out pairs were not measured on the way: train.eval_every_steps has them on the same axes.")
    return [" ".join(texts)]


def _sources(facts: Facts) -> list[Block]:
    """What training and evaluation tell of each source of a mixture."""
    parts = [(facts.summary.get(part) or {}).get("sources") or {} for part in ("train", "eval")]
    names = dict.fromkeys(name for part in parts for name in part)
    if not names:
        return []
    rows = []
    for name in names:
        of = {key: value for part in parts for key, value in part.get(name, {}).items()}
        measured = [estimate(of[key]) if of.get(key) else "" for key in ("accuracy", "win_rate")]
        rows.append(
            [
                name,
                f"{of['pairs']:,}" if "pairs" in of else "",
                f"{of['share']:.1%}" if "share" in of else "",
                f"{of['passes']:.2f}" if "passes" in of else "",
                f"{of['loss']:.4f}" if "loss" in of else "",
                *measured,
            ]
        )
    head = ["source", "training pairs", "share of the training", "times each", "loss, last epoch", "held-out accuracy"]
    return [Table([*head, f"win rate against {facts.opponent}"], rows, caption="By source")]
