"""The configuration: one frozen tree that mirrors the YAML file, key for key. Each section has a file.

Unknown keys and combinations that cannot work fail at load, before anything else starts.
A default stands in its section and nowhere else.
"""

from __future__ import annotations

from pydantic import model_validator

from dpo_ray.config.data import Data
from dpo_ray.config.engines import VLLM, Reference
from dpo_ray.config.evaluate import Evaluate
from dpo_ray.config.generate import Generate
from dpo_ray.config.iterate import Iterate
from dpo_ray.config.losses import losses_using
from dpo_ray.config.model import Model
from dpo_ray.config.placement import Placement
from dpo_ray.config.publish import Publish
from dpo_ray.config.report import Report
from dpo_ray.config.run import Run
from dpo_ray.config.section import Section
from dpo_ray.config.track import Track
from dpo_ray.config.train import Train
from dpo_ray.config.tune import Tune


class Config(Section):
    """The whole tree."""

    run: Run
    model: Model
    data: Data = Data()
    generate: Generate | None = None
    """Make the pairs from prompts; left out: read them from data.train."""
    vllm: VLLM = VLLM()
    reference: Reference = Reference()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    publish: Publish = Publish()
    report: Report = Report()
    """What the pages of a run hold."""
    track: Track = Track()
    """Which experiment trackers follow a run."""
    tune: Tune | None = None
    """The search of `dpo-ray sweep`."""
    iterate: Iterate | None = None
    """The rounds of `dpo-ray iterate`."""
    placement: Placement = Placement()
    """Which nodes of a cluster do what; left out: each whatever it has room for."""

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        if (self.data.train is None) == (self.generate is None):
            found = "neither" if self.generate is None else "both"
            raise ValueError(
                f"pairs come from data.train or from generate, but {found} is given: name exactly one of them"
            )
        if self.generate is not None and self.data.eval is not None:
            raise ValueError(
                "data.eval goes with data.train; with generate a share of the prompts is held out: leave data.eval "
                "out, and set data.held_out_fraction"
            )
        if self.generate is not None:
            for key in ("layout", "columns", "pairing", "ignore", "ties", "loss_turns"):
                value = getattr(self.data, key)
                if value != Data.model_fields[key].default:
                    raise ValueError(f"data.{key} is about the rows of data.train; with generate, leave it out")
        idle = self.train.changed("eval_fraction", "eval_pairs") if self.train.eval_every_steps is None else []
        if idle and self.tune is None:  # a sweep sets the steps where they are left out
            raise ValueError(
                f"train.{idle[0]} is of the evaluations while training, and there are none: set "
                f"train.eval_every_steps, the steps between them, or leave train.{idle[0]} out"
            )
        if self.data.ties == "keep" and "preference" not in self.train.loss.uses:
            raise ValueError(
                f"data.ties=keep makes pairs with a preference of .5, which train.loss.type={self.train.loss.type} does"
                f" not use: take one that does ({', '.join(losses_using('preference'))}), or leave data.ties out"
            )
        if self.generate is not None and self.data.long_prompts != "drop":
            raise ValueError(
                f"data.long_prompts={self.data.long_prompts} goes with data.train; with generate, a prompt over "
                "data.max_prompt_tokens is never sampled for: raise that limit, or leave data.long_prompts out"
            )
        if self.iterate is not None and (self.generate is None or self.evaluate.win_rate is None):
            lacking = "generate" if self.generate is None else "evaluate.win_rate"
            raise ValueError(
                f"iterate has the policy sample its own pairs, and goes by its win rate, but there is no {lacking}: "
                "add it, or leave iterate out"
            )
        lora = self.model.lora
        self._require_sensible_memory()
        if self.iterate is not None and self.iterate.rounds > 1 and lora is not None and lora.export == "adapter":
            raise ValueError(
                "with model.lora.export=adapter the second round's model would be an adapter, and would train one of a "
                " merged model that is kept nowhere: set model.lora.export=merged"
            )
        if self.train.start == "published" and lora is not None and lora.export == "adapter":
            raise ValueError(
                "train.start=published with model.lora.export=adapter would train an adapter of a merged model that is "
                "kept nowhere: set model.lora.export=merged, or train.start=base"
            )
        others = [one.path for one in self.generate.models if one.path is not None] if self.generate else []
        if self.iterate is not None and others:
            raise ValueError(
                f"generate.models names {others[0]}, but with iterate the policy of each round samples: leave its "
                "`path` out, or leave iterate out"
            )
        known = ["held_out", *self.evaluate.sets]
        if len(set(known)) < len(known):
            raise ValueError("evaluate.sets names a set held_out, which is the run's own: call it otherwise")
        if unknown := [name for name in self.publish.gate.no_regression if name not in known]:
            raise ValueError(
                f"publish.gate.no_regression names the set {unknown[0]}, which is not known ({', '.join(known)}): add "
                "it to evaluate.sets"
            )
        if self.evaluate.win_rate is None and (asked := self.publish.gate.asks_for_samples):
            raise ValueError(
                f"publish.gate.{asked[0]} asks for what is measured on sampled answers, and none are sampled: add "
                f"evaluate.win_rate or set publish.gate.{asked[0]}=null"
            )
        if self.publish.gate.chosen_drop_below is not None and not self.train.loss.needs_reference:
            raise ValueError(
                "publish.gate.chosen_drop_below compares with the reference, and train.loss.type="
                f"{self.train.loss.type} has none: set it to null"
            )
        return self

    def _require_sensible_memory(self) -> None:
        train, lora = self.train, self.model.lora
        if train.in_bfloat16 and lora is not None:
            raise ValueError(
                f"train.optimizer={train.optimizer} keeps the trained weights in bfloat16, and with model.lora these "
                "are adapters, which take little memory in float32: set train.optimizer=adamw or adamw_8bit"
            )
        if train.in_bfloat16 and self.model.dtype != "bfloat16":
            raise ValueError(
                f"train.optimizer={train.optimizer} keeps the weights in bfloat16, but model.dtype={self.model.dtype} "
                "would compute with more digits than they have: set model.dtype=bfloat16, or train.optimizer=adamw_8bit"
            )
        quantization = self.model.quantization
        if quantization is not None and self.reference.engine == "vllm" and train.loss.needs_reference:
            raise ValueError(
                f"model.lora.quantization={quantization} has training start from quantized weights, which "
                "reference.engine=vllm does not score with: the rewards would not begin at 0. Set "
                "reference.engine=torch, which scores with the same weights"
            )
