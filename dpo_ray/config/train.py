"""The section `train`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dpo_ray.config.losses import Loss, SigmoidLoss
from dpo_ray.config.reward import Dtype
from dpo_ray.config.section import Section

Optimizer = Literal["adamw", "adamw_8bit", "adamw_bf16", "adamw_8bit_bf16"]
EveryNth = Annotated[int, Field(ge=2, strict=True)]
Metric = Literal["eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"]
"""What training may be steered by: measured on held-out pairs."""


class EarlyStopping(Section):
    """When training ends before its last step."""

    metric: Metric = "eval_loss"
    """Training stops when this no longer improves."""
    patience: int = Field(3, ge=1)
    """Evaluations in a row without an improvement that are waited for."""
    min_improvement: float = Field(0.0, ge=0.0)
    """A smaller change counts as none."""


class Sharding(Section):
    """How a model is spread over workers."""

    workers: int | None = Field(None, ge=2)
    """Workers that hold a model together, a divisor of train.num_workers: workers of one node, where several nodes have
    one each and only gradients are to travel between them. Left out: all workers hold one."""
    keep_gathered: bool = False
    """Keep each layer's weights gathered between the forward and the backward pass: less is sent, and a worker has
    memory for the whole model in model.dtype beside its part."""
    prefetch_layers: int = Field(0, ge=0)
    """Layers whose weights are asked for while another one computes, beside what FSDP asks for itself; each takes its
    memory. On a GPU only."""


class Train(Section):
    """The loss, the optimizer, and the workers."""

    loss: Loss = SigmoidLoss(type="sigmoid")
    """The loss; each type takes only the options that it uses."""
    start: Literal["base", "published"] = "base"
    """Whose weights training starts with: those of `model`, or those of what is published under run.name now, which
    must descend from `model`; where nothing is, those of `model`. The reference is `model` either way."""
    learning_rate: float = Field(1e-6, gt=0.0)
    """Peak learning rate of AdamW."""
    optimizer: Optimizer = "adamw"
    """What AdamW keeps, for each trained weight. adamw: weight, gradient and both moments in float32, 16 bytes.
    adamw_8bit: the moments in 8 bits, in blocks of 256 (arXiv:2110.02861), 10 bytes. adamw_bf16: all in bfloat16 but
    the second moment, which could not fall there, 10 bytes; the weight is rounded up or down at random so that small
    steps are not lost (arXiv:2010.06192). adamw_8bit_bf16: both, 6 bytes. By torchao, of the extra `memory`."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_fraction: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0.0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0.0)
    """Gradients are clipped to this global norm."""
    global_batch_size: int = Field(64, ge=1)
    """Pairs in an optimizer step, over all workers: the same result whatever their number."""
    tokens_per_microbatch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Tokens that a worker computes at once; a longer pair goes alone. auto: by the model's shape and the memory."""
    epochs: int = Field(1, ge=1)
    """Passes over the training pairs."""
    router_aux_loss: float | None = Field(None, ge=0.0)
    """Of a mixture of experts: how much the loss that keeps its experts evenly used counts beside the preference loss,
    over the global batch. Left out: the router_aux_loss_coef of the model's configuration where that says
    output_router_logits, otherwise nothing. It costs another forward pass, where a step has several micro-batches."""
    ema_decay: float | None = Field(None, gt=0.0, lt=1.0)
    """Decay of an exponential moving average of the weights, which is then what is evaluated and published."""
    num_workers: int = Field(1, ge=1)
    """Data-parallel workers."""
    min_workers: int | None = Field(None, ge=1)
    """Elastic training: go on with as few workers as this while the cluster lacks room for num_workers."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: each worker holds the whole model. fsdp: model, gradients and optimizer are sharded over the workers, from
    the first byte: each reads its own part of the weights."""
    sharding: Sharding = Sharding()
    """How strategy=fsdp shards."""
    offload: bool = False
    """Keep a worker's part of weights, gradients and moments in the host's memory, and update them there; a layer's
    weights come to the GPU when it computes. For strategy=fsdp, with one worker too. On a GPU only."""
    activation_checkpointing: bool | EveryNth = False
    """Compute the activations again in the backward pass: less memory, about a third more time. true: those of every
    layer; a number n: of every n-th one."""
    activation_offload: bool = False
    """Keep what the layers that are computed again start from in the host's memory until then. On a GPU only."""
    compile: bool = False
    """Compile each decoder layer with torch.compile: minutes at the start, then fewer small kernels. On a GPU only."""
    cpus_per_worker: float = Field(1.0, gt=0.0)
    """Cores of one worker."""
    use_gpu: bool = False
    """Workers on GPUs (NCCL); otherwise on CPU (gloo)."""
    gpus_per_worker: float = Field(1.0, gt=0.0, le=1.0)
    """GPUs of one worker. Below 1, trials of a sweep share a GPU: one worker each, with that part of its memory."""
    checkpoint_every_steps: int = Field(50, ge=1)
    """Steps between checkpoints: what a killed run loses at most."""
    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints kept: the latest, or with keep_best the best and the latest one."""
    eval_every_steps: int | None = Field(None, ge=1)
    """Steps between evaluations on held-out pairs while training, and one at the end; left out: none."""
    eval_pairs: int = Field(512, ge=1)
    """Held-out pairs of such an evaluation, at most: drawn at random, the same ones each time."""
    eval_fraction: float = Field(1.0, gt=0.0, le=1.0)
    """Share of the held-out prompts, by their hash, that such an evaluation takes its pairs from. Below 1, the accuracy
    that a model is published by counts the others only, for nothing was chosen by these."""
    keep_best: Metric | None = None
    """Publish the weights of the evaluation that was best by this, instead of the last ones."""
    early_stopping: EarlyStopping | None = None
    """Stop before the last step when the held-out metric no longer improves."""
    export_dtype: Dtype | None = None
    """Precision of the weights that are evaluated and published; null: that of the model's own files, and float32 for
    an adapter that is published alone."""
    log_every_steps: int = Field(1, ge=1)
    """Steps between reported metrics."""
    entropy_every_steps: int | None = Field(10, ge=1)
    """Steps between reports of entropy and mean logits, which cost a pass over all logits; null: none."""
    max_nonfinite_steps: int = Field(0, ge=0)
    """Steps with a loss or gradient that is NaN or infinite that are left out, before the run stops at one more."""
    max_failures: int = Field(3, ge=0)
    """Restarts from the last checkpoint after a worker died, before the run fails."""

    @classmethod
    def changes_result(cls, name: str) -> bool:
        """Whether an option changes what is learnt, and not just where or how fast it is computed."""
        return name not in {
            "start",  # the weights themselves are part of what a training is known by
            "tokens_per_microbatch",
            "num_workers",
            "min_workers",
            "strategy",
            "sharding",
            "offload",
            "activation_checkpointing",
            "activation_offload",
            "compile",
            "cpus_per_worker",
            "use_gpu",
            "gpus_per_worker",
            "checkpoint_every_steps",
            "keep_checkpoints",
            "log_every_steps",
            "entropy_every_steps",
            "max_failures",
        }

    def identity(self) -> dict[str, Any]:
        """The options that change the result."""
        execution = {name for name in type(self).model_fields if not self.changes_result(name)}
        unset = {"router_aux_loss"} if self.router_aux_loss is None else set()  # the model's own, which is known
        # AdamW in float32 is what a training is known by that names no optimizer.
        unset |= {"optimizer"} if self.optimizer == "adamw" else set()
        return self.model_dump(mode="json", exclude=execution | unset)

    @property
    def in_bfloat16(self) -> bool:
        """Whether the trained weights themselves are in bfloat16."""
        return self.optimizer.endswith("_bf16")

    @property
    def recomputes_every(self) -> int:
        """Of so many layers one is computed again in the backward pass; 0: none is."""
        return int(self.activation_checkpointing)

    @property
    def gpus(self) -> float:
        """GPUs of one worker, 0 on CPU."""
        return self.gpus_per_worker if self.use_gpu else 0.0

    @model_validator(mode="after")
    def _combinations(self) -> Train:
        if self.gpus_per_worker < 1 and not (self.use_gpu and self.num_workers == 1):
            raise ValueError(
                f"train.gpus_per_worker is {self.gpus_per_worker:g}, a part of a GPU, which is for train.use_gpu=true "
                "with train.num_workers=1, as two workers of one training cannot share a GPU: set these, or give each "
                "a whole one"
            )
        if self.global_batch_size < self.num_workers:
            raise ValueError(
                f"train.global_batch_size is {self.global_batch_size}, but each of the "
                f"{self.num_workers} workers (train.num_workers) needs at least one pair a step: raise the first, or "
                "lower the other"
            )
        self._require_sensible_sharding()
        self._require_sensible_memory()
        if self.compile and not self.use_gpu:
            raise ValueError(
                "train.compile is true, but train.use_gpu is false: on CPU, compiling takes minutes and gains nothing. "
                "Leave train.compile out"
            )
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"train.min_workers is {self.min_workers}, more than train.num_workers={self.num_workers}: set it "
                "lower, or leave it out for a fixed number of workers"
            )
        if self.eval_every_steps is None:
            for name, metric in (
                ("keep_best", self.keep_best),
                ("early_stopping", self.early_stopping and self.early_stopping.metric),
            ):
                if metric is not None:
                    raise ValueError(
                        f"train.{name} goes by {metric}, which is not measured: set train.eval_every_steps, the steps "
                        f"between evaluations, or leave train.{name} out"
                    )
        return self

    def _require_sensible_memory(self) -> None:
        if self.offload and self.strategy != "fsdp":
            raise ValueError(
                f"train.offload is true, but train.strategy is {self.strategy}, under which each worker holds the "
                "whole model on its device: set train.strategy=fsdp, which serves one worker too, or leave "
                "train.offload out"
            )
        for name in ("offload", "activation_offload"):
            if getattr(self, name) and not self.use_gpu:
                raise ValueError(
                    f"train.{name} is true, but train.use_gpu is false: on CPU all is in the host's memory already. "
                    f"Leave train.{name} out"
                )
        if self.activation_offload and not self.activation_checkpointing:
            raise ValueError(
                "train.activation_offload is true, but train.activation_checkpointing is false: what is kept on the "
                "host is what layers are computed again from. Set train.activation_checkpointing=true, or leave "
                "train.activation_offload out"
            )
        if self.in_bfloat16 and self.ema_decay is not None:
            raise ValueError(
                f"train.optimizer is {self.optimizer}, which keeps weights in bfloat16, and a moving average of them "
                f"with train.ema_decay={self.ema_decay:g} would stand still there: take train.optimizer=adamw_8bit, or "
                "leave train.ema_decay out"
            )
        if "8bit" in self.optimizer and self.strategy == "fsdp" and self.min_workers is not None:
            raise ValueError(
                f"train.optimizer is {self.optimizer}, whose moments are in blocks of a worker's own part, but with "
                f"train.min_workers={self.min_workers} training goes on with any number of workers: leave "
                "train.min_workers out, or take train.optimizer=adamw or train.strategy=ddp"
            )

    def _require_sensible_sharding(self) -> None:
        sharding = self.sharding
        if self.strategy != "fsdp" and sharding != Sharding():
            [name, *_] = sharding.model_fields_set or ("workers",)
            raise ValueError(
                f"train.sharding.{name} is {getattr(sharding, name)}, but train.strategy is {self.strategy}, under "
                "which each worker holds the whole model: set train.strategy=fsdp, or leave train.sharding out"
            )
        if sharding.workers is not None and self.num_workers % sharding.workers:
            raise ValueError(
                f"train.sharding.workers is {sharding.workers}, which does not divide "
                f"train.num_workers={self.num_workers}: set one of them so that all groups of workers are as large"
            )
        if sharding.workers is not None and self.min_workers is not None:
            raise ValueError(
                f"train.sharding.workers is {sharding.workers}, but with train.min_workers={self.min_workers} training "
                "goes on with any number of workers, which it may not divide: leave one of the two out"
            )
        if sharding.prefetch_layers and not self.use_gpu:
            raise ValueError(
                f"train.sharding.prefetch_layers is {sharding.prefetch_layers}, but train.use_gpu is false: on CPU "
                "weights are gathered while nothing computes. Leave it out"
            )


def backend(on_gpu: bool, offload: bool) -> str:
    """What training workers exchange by, as torch names it: NCCL, which does not send what lies on the host."""
    if not on_gpu:
        return "gloo"
    return "cpu:gloo,cuda:nccl" if offload else "nccl"
