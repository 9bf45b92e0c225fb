"""The configuration: one frozen tree that mirrors the YAML file, key for key.

Unknown keys and combinations that cannot work fail at load, before anything else starts.
A default stands here and nowhere else.
"""

from __future__ import annotations

from collections import Counter
from datetime import date
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dpo_ray.config.hooks import Hooks
from dpo_ray.config.iterate import Iterate
from dpo_ray.config.losses import Judged, Loss, SigmoidLoss, losses_using
from dpo_ray.config.pairing import CandidatePairing, Pairing
from dpo_ray.config.placement import Placement
from dpo_ray.config.push import PushToHub
from dpo_ray.config.report import Report
from dpo_ray.config.reward import Dtype, Reward, Rule
from dpo_ray.config.section import Section
from dpo_ray.config.sources import DataSource, Paths, TrainData, require_a_mixture
from dpo_ray.config.tolerance import Tolerance
from dpo_ray.config.track import Track
from dpo_ray.config.tune import Tune
from dpo_ray.errors import ConfigError
from dpo_ray.formats.registry import AUTO, formats


def _check_layout(name: str) -> str:
    if name not in (AUTO, *formats()):
        raise ValueError(f"{name!r} is no format; name one of {AUTO}, {', '.join(formats())}")
    return name


def _among_formats(schema: dict[str, Any]) -> None:
    schema["enum"] = [AUTO, *formats()]


def _no_number(value: Any) -> Any:
    """A number would be taken for seconds since 1970: 20261101 for a day of August 1970."""
    if isinstance(value, int | float):
        raise ValueError(f"{value} is a number, and a day is asked for: write it as in 2026-11-01")
    return value


Day = Annotated[date, BeforeValidator(_no_number)]

LongPrompts = Literal["drop", "keep_start", "keep_end"]


LongCompletions = Literal["drop", "cut"]


LossTurns = Literal["all", "last"]


Quantization = Literal["nf4", "int8"]


class Run(Section):
    """What a run is called, where it writes, and how it speaks."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Name of the run and of the published model: letters, digits, dot, dash, underscore."""
    output: str
    """Where everything goes: a local folder or a URI such as s3://bucket/prefix."""
    seed: int = Field(0, ge=0)
    """Seeds the split, the sampling and the order of the pairs."""
    when_busy: Literal["wait", "leave"] = "wait"
    """Where another run is at the same training, or publishes under the same name: wait until it has ended and take
    over what it made, or leave at once, with exit code 75."""
    wait_for_resources: float = Field(15.0, ge=0.0)
    """Minutes that a stage waits, at most, for a cluster to grow where it has too little room: its autoscaler is asked
    for more. 0: the run is refused at its start, as is right for a cluster that nothing adds nodes to."""

    log_format: Literal["text", "json"] = "text"
    """How a run's lines are printed: text, for people; json, for what collects logs: each line an object with time,
    level, run, stage, shard, node and message. log.jsonl in the run's folder has these objects either way."""
    hooks: Hooks = Hooks()
    """Who is told how the run ended."""

    def require_absolute_output(self) -> None:
        """Raises ConfigError where `output` is a relative path: for a job on a cluster.

        A job runs in a working directory that Ray makes and removes, on whichever node it likes.
        """
        if "://" not in self.output and not PurePath(self.output).is_absolute() and not self.output.startswith("~"):
            raise ConfigError(
                f"run.output is {self.output}, a relative path, which in a job on a cluster lies below Ray's "
                "temporary working directory: what is written there is lost. Name a bucket, as in s3://bucket/folder, "
                "or the absolute path of a folder that is mounted on all nodes."
            )


class LoRA(Section):
    """Train low-rank adapters (arXiv:2106.09685) instead of all weights. The reference is the model without them."""

    rank: int = Field(16, ge=1)
    """Rank of the update of each adapted matrix."""
    alpha: float = Field(32.0, gt=0.0)
    """The update is scaled by alpha / rank."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Names of the adapted layers; all-linear: every linear layer but the output head."""
    export: Literal["adapter", "merged"] = "adapter"
    """What is published: the adapter alone, or the whole model with the adapter merged into its weights."""
    quantization: Quantization | None = None
    """How the frozen weights of the decoder layers' linear layers are held: nf4, in 4 bits (QLoRA, arXiv:2305.14314);
    int8, in 8 bits, scaled by row (arXiv:2208.07339). They are computed with in model.dtype, and the reference is the
    model with these weights, scored with reference.engine=torch. Merged, the adapter is added to these weights; alone,
    it is published for the model as it was. Left out: in model.dtype, as all other frozen weights are. By bitsandbytes,
    of the extra `memory`."""

    def identity(self) -> dict[str, Any]:
        """The options as a training is known by them."""
        return self.model_dump(mode="json", exclude=set() if self.quantization else {"quantization"})


class Model(Section):
    """The model that is trained, which is the reference too."""

    path: str
    """A Hugging Face folder, a PEFT adapter's folder (taken merged into its base), a .gguf file, a hub id, or
    package://<python package>/<file.gguf>."""
    revision: str | None = None
    """Revision of a hub id; a local path has none."""
    dtype: Dtype = "float32"
    """Precision of the trainer's forward and of the reference scores: the two must be equal to agree."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model. Only for models whose code you have read."""
    chat_template: str | None = None
    """A file with the chat template (Jinja) to use in place of the model's own, here and in what is published: a path
    that every node sees, or a URI. With a job it may travel along (submit --ship)."""
    template_arguments: dict[str, Any] = Field(default_factory=dict)
    """Given to the chat template by name wherever it is rendered, for training and for sampling alike, such as
    {enable_thinking: false}."""
    lora: LoRA | None = None
    """Train adapters only; left out: all weights."""

    @property
    def quantization(self) -> Quantization | None:
        """How the frozen weights of linear layers are held in training; None: in model.dtype, or trained."""
        return self.lora.quantization if self.lora is not None else None


class Columns(Section):
    """What the fields of a row are called in the files, where not by their own names."""

    prompt: str | None = None
    """Column of the prompt: text or messages."""
    system: str | None = None
    """Column of the system message that the dialogue begins with: text. null: none."""
    chosen: str | None = None
    """Column of the better answer, or of the dialogue that ends with it."""
    rejected: str | None = None
    """Column of the worse answer, or of the dialogue that ends with it."""
    completion: str | None = None
    """Column of a single answer."""
    label: str | None = None
    """Column that tells whether a single answer is desirable: true, false, 1 or 0."""
    completions: str | None = None
    """Column of ranked answers: a list of them."""
    scores: str | None = None
    """Column of the scores of ranked answers: a number for each."""
    tools: str | None = None
    """Column of the tools that the chat template shows: a list of JSON schemas, or that list as JSON text."""
    weight: str | None = None
    """Column of how many pairs a row counts as in the loss: a number above 0. null: 1."""
    margin: str | None = None
    """Column of how far the rewards of chosen and rejected are known to lie apart, in units of the reward (β times a
    log-ratio): what the margin should be at least. null: 0."""
    preference: str | None = None
    """Column of the probability, from 0 to 1, that chosen is the better answer: a soft label. Below .5 the two change
    sides. null: 1."""

    def renamed(self) -> dict[str, str]:
        """Field → its column, for the fields that are named here."""
        return {field: column for field, column in self if column is not None}

    @model_validator(mode="after")
    def _once(self) -> Columns:
        fields: dict[str, str] = {}
        for field, column in self.renamed().items():
            if column in fields:
                raise ValueError(
                    f"data.columns.{fields[column]} and data.columns.{field} both name the column {column!r}: name "
                    "another for one of them"
                )
            fields[column] = field
        return self


class Data(Section):
    """Preference data, and which of them become pairs."""

    train: TrainData | None = None
    """Preference data, Parquet, Arrow as `datasets` saves it, JSON lines (.jsonl, .ndjson), JSON arrays (.json), CSV or
    TSV, text also as .gz or .zst: a file, a folder or a glob, local or a URI, or a list of these; or a data set of the
    hub, owner/name or hf://datasets/owner/name@revision/path. What lies in run.output is taken only where a path leads
    into it. Left out when `generate` makes the pairs. Or a mixture: a list of sources, each with name, path, weight and
    max_rows. Of pairs that several sources have, that of the first one stays. An epoch is as many pairs as all sources
    hold: of one that is smaller than its share pairs come again, in another order, and one that is larger goes on where
    it was."""
    since: Day | None = None
    """Of `train` only the files of this day and later ones, as their paths tell (date=2026-11-01/…, or a date in the
    file's name). Held-out data named by `eval` is taken whole."""
    until: Day | None = None
    """Of `train` only the files up to this day, it included."""
    partitions: tuple[Annotated[str, Field(pattern=r"^[^=/]+=[^/]+$")], ...] = ()
    """Of `train` only the files in these Hive-style folders, such as date=2026-11-01: in any of those with the same
    key, and in one of each key."""
    eval: Paths | None = None
    """Held-out preference data, named likewise. Left out: held_out_fraction of the prompts of `train`."""
    layout: Annotated[str, AfterValidator(_check_layout)] = Field(AUTO, json_schema_extra=_among_formats)
    """How the rows are written: a format, called as its file in dpo_ray/formats/known, such as paired (chosen,
    rejected, and prompt where these are not whole dialogues), unpaired (prompt, completion, label) or ranked (prompt,
    completions, scores). auto: each file as its columns and first rows are, which one format alone must fit."""
    columns: Columns = Columns()
    """Column names of the files that differ from those of the format. They stand for the format's own wherever columns
    are looked at."""
    ignore: tuple[Judged, ...] = ()
    """Of the columns weight, margin and preference, those that are not to be read: a loss that does not use what the
    data have is refused."""
    ties: Literal["drop", "keep"] = "drop"
    """Two answers of which neither is the better one. keep: they are a pair with a preference of .5, whose answers the
    loss draws together."""
    pairing: Pairing = Pairing()
    """How rows of ranked answers become pairs."""
    held_out_fraction: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of the prompts, chosen by their hash, kept from training for evaluation. Not to be set beside `eval`."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """The longest prompt, with all that the chat template writes."""
    long_prompts: LongPrompts = "drop"
    """A pair with a longer prompt is dropped and counted as prompt_too_long; or the prompt is cut and the pair counted
    as truncated_prompt. keep_start keeps its first tokens, and then the end of the user's turn and the opening of the
    assistant's. keep_end keeps its last tokens, after the BOS. A prompt that is sampled for is never cut: a longer one
    is left out there."""
    max_completion_tokens: int = Field(512, ge=1)
    """The longest completion, with its end-of-turn token."""
    long_completions: LongCompletions = "drop"
    """A pair with a longer completion is dropped and counted as completion_too_long; or the completion is cut, without
    an end-of-turn token, for it did not end there, and the pair counted as truncated_completion."""
    loss_turns: LossTurns = "all"
    """Of an answer of several turns, whose tokens bear the loss: those of each of the assistant's turns, or of the last
    one. What tools and the user say between them never does, nor do turns that both answers begin with."""
    max_quarantined_fraction: float = Field(0.05, ge=0.0, le=1.0)
    """Ingest fails when a larger share of the rows is unusable, ties left aside; and so does the reference when its
    engine cannot score a larger share."""
    max_characters: int = Field(1_000_000, ge=1)
    """A row with more characters is quarantined as too_long, unseen: it could fill a worker's memory before the limits
    in tokens, which are what decides for all other rows, can tell. So is a line of JSON over 16 MiB, whatever stands
    here."""
    rows_per_shard: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rows in a unit of work: what is lost at most when a process dies, and what is computed at once. auto: a sixteenth
    of a file, but 128 KiB to 64 MiB of text. Give a number where a row takes long, as on CPUs."""

    def require_used(self, names: set[str]) -> None:
        """Raises ConfigError where an option means nothing to rows of any of these formats."""
        found = " and ".join(sorted(names))
        used = {field for name in names for field in formats()[name].reads}
        for field, column in self.columns.renamed().items():
            if field not in used:
                raise ConfigError(
                    f"data.columns.{field}={column} names a field that {found} rows do not have: leave it out, or set "
                    "data.layout to what the rows are"
                )
        if self.pairing != Pairing() and not any(formats()[name].layout == "ranked" for name in names):
            raise ConfigError(
                f"data.pairing is for ranked rows (prompt, completions, scores), and these are {found}: leave it out, "
                "or set data.layout=ranked"
            )

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """Those of a mixture; none where `train` is paths."""
        found = () if isinstance(self.train, str) or self.train is None else self.train
        return tuple(source for source in found if isinstance(source, DataSource))

    @property
    def weights(self) -> dict[str, float] | None:
        """Source → its weight; None where each pair comes once an epoch."""
        weights = {source.name: source.weight for source in self.sources if source.weight is not None}
        return weights or None

    @property
    def chooses_files(self) -> dict[str, str]:
        """Options that choose among the files of `train` → their values as text."""
        chosen = {"since": self.since, "until": self.until, "partitions": ", ".join(self.partitions) or None}
        return {f"data.{name}": str(value) for name, value in chosen.items() if value is not None}

    @model_validator(mode="after")
    def _all_used(self) -> Data:
        if self.since is not None and self.until is not None and self.until < self.since:
            raise ConfigError(
                f"data.until={self.until} lies before data.since={self.since}, so that no day is left: swap them"
            )
        if self.train is None and (given := list(self.chooses_files)):
            raise ConfigError(f"{given[0]} chooses among the files of data.train, and there are none: leave it out")
        require_a_mixture(self.sources)
        for field in self.ignore:
            if (column := getattr(self.columns, field)) is not None:
                raise ConfigError(
                    f"data.columns.{field}={column} names a column that data.ignore leaves aside: leave one of them out"
                )
        if self.layout != AUTO:
            self.require_used({self.layout})
        if self.eval is not None and self.held_out_fraction != Data.model_fields["held_out_fraction"].default:
            raise ConfigError(
                f"data.held_out_fraction={self.held_out_fraction:g} holds out prompts of data.train, but data.eval "
                "names the held-out data: leave one of them out"
            )
        return self


class Sampling(Section):
    """How completions are drawn. Samplers are vLLM's."""

    samples: int = Field(4, ge=1)
    """Completions sampled for each prompt."""
    include_greedy: bool = False
    """The first of them is the greedy one: at each place the likeliest token."""
    temperature: float = Field(1.0, ge=0.0)
    """Sampling temperature; 0 is greedy, with one sample."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Nucleus sampling: the smallest set of tokens with this probability mass."""
    top_k: int | None = Field(None, ge=1)
    """Only so many of the likeliest tokens; null: all."""
    min_p: float = Field(0.0, ge=0.0, lt=1.0)
    """Only tokens with this share of the likeliest one's probability."""
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    """Taken from the logits of tokens that the completion has."""
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    """Taken from the logits of tokens for each time that the completion has them."""
    repetition_penalty: float = Field(1.0, gt=0.0)
    """Divides the positive logits, and multiplies the negative ones, of tokens that prompt or completion have."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, which is then finished; they are not part of it."""
    max_tokens: int = Field(256, ge=1)
    """A completion is cut here, and is then not finished."""
    dtype: Dtype = "bfloat16"
    """Precision of the generating engine."""

    @model_validator(mode="after")
    def _combinations(self) -> Sampling:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"samples is {self.samples} with temperature 0, which would all be the same: set samples=1, or "
                "include_greedy=true with a temperature above 0"
            )
        if self.temperature == 0 and self.include_greedy:
            raise ValueError("include_greedy means nothing with temperature 0, where all is greedy: leave it out")
        if self.include_greedy and self.samples == 1:
            raise ValueError("include_greedy with samples=1 draws nothing else: set temperature=0 instead")
        if "" in self.stop:
            raise ValueError("stop holds an empty text, which would end every completion at once: leave it out")
        return self


_BRIEF_ANSWER: Reward = (Rule(function="dpo_ray.rewards:brief_answer"),)


_OF_MODEL = ("revision", "trust_remote_code", "chat_template", "template_arguments")


class SampledModel(Section):
    """A model that candidates are drawn from, or one of the ways in which it is asked for them."""

    path: str | None = None
    """As model.path; left out: `model` itself, and its other options."""
    revision: str | None = None
    """As model.revision."""
    trust_remote_code: bool = False
    """As model.trust_remote_code."""
    chat_template: str | None = None
    """As model.chat_template."""
    template_arguments: dict[str, Any] = Field(default_factory=dict)
    """As model.template_arguments."""
    samples: int = Field(ge=1)
    """Its completions of each prompt."""
    system_prompt: str | None = Field(None, min_length=1)
    """What it is asked with in place of the prompt's own system turn. The pairs are without: so a model learns to do
    unasked what it does when it is told (context distillation, arXiv:2112.00861)."""

    def model(self, policy: Model) -> Model:
        """As the section `model` would name it. policy: that section itself."""
        if self.path is None:
            return policy
        return Model(path=self.path, **self.model_dump(include=set(_OF_MODEL)))

    @model_validator(mode="after")
    def _of_the_model(self) -> SampledModel:
        if self.path is None and (given := self.changed(*_OF_MODEL)):
            raise ValueError(
                f"{given[0]} is an option of a model, but this entry names none and so draws from `model`: set it "
                "there, or name a `path`"
            )
        return self


class Generate(Section):
    """Pairs of completions that models sample of prompts, and that `reward` ranks."""

    prompts: str
    """JSON lines or Parquet with a `prompt` column (text or messages), and an `answer` where rules compare with one;
    package:// paths are allowed."""
    system_prompt: str | None = Field(None, min_length=1)
    """Put before prompts that have no system turn of their own; the pairs have it too."""
    sampling: Sampling = Sampling()
    """How completions are drawn."""
    models: tuple[SampledModel, ...] = ()
    """Who draws them, each its own number of samples. Left out: `model`, sampling.samples of them."""
    reward: Reward = _BRIEF_ANSWER
    """What scores the completions: module:function, a source, or a list of sources with weights."""
    pairing: CandidatePairing = CandidatePairing()
    """How scored completions become pairs."""
    prompts_per_shard: int = Field(64, ge=1)
    """Prompts in a unit of work."""

    @property
    def samples(self) -> int:
        """Completions of each prompt, over all models."""
        return sum(model.samples for model in self.models) if self.models else self.sampling.samples

    @model_validator(mode="after")
    def _combinations(self) -> Generate:
        if self.models and self.sampling.changed("samples"):
            raise ValueError(
                f"generate.sampling.samples={self.sampling.samples} is of one model, but with generate.models each has "
                "`samples` of its own: leave it out"
            )
        if self.samples < 2:
            where = "generate.models[0].samples" if self.models else "generate.sampling.samples"
            raise ValueError(f"{where} is 1, but a pair needs at least 2 samples of a prompt: set it to 2 or more")
        return self

    @model_validator(mode="before")
    @classmethod
    def _earlier_names(cls, given: Any) -> Any:
        """min_score_gap and pairs_per_prompt stood here before `pairing` did, and are read as its own."""
        moved = {"min_score_gap", "pairs_per_prompt"}
        if not isinstance(given, dict) or not moved & given.keys():
            return given
        pairing = dict(given.get("pairing") or {})
        for name in sorted(moved & given.keys()):
            if name in pairing:
                raise ValueError(
                    f"generate.{name} is an earlier name of generate.pairing.{name}, and both are given: leave one out"
                )
            pairing[name] = given[name]
        return {key: value for key, value in given.items() if key not in moved} | {"pairing": pairing}


class VLLM(Section):
    """The engines that sample and score."""

    num_actors: int = Field(1, ge=1)
    """Engines that work side by side, at most: Ray starts one, and more while there is work and room for them."""
    cpus_per_actor: float = Field(1.0, gt=0.0)
    """Cores that Ray sets aside for one engine."""
    gpus_per_actor: int = Field(0, ge=0)
    """GPUs of one engine (its tensor-parallel size); 0 is vLLM's CPU build."""
    kv_cache_gib: int = Field(2, ge=1)
    """Key-value cache of an engine on CPU, in GiB."""
    gpu_memory_utilization: float = Field(0.9, gt=0.0, le=1.0)
    """Share of a GPU's memory that an engine may take."""
    max_num_seqs: int = Field(256, ge=1)
    """Sequences that an engine works on at once."""
    max_num_batched_tokens: int | None = Field(None, ge=16)
    """Tokens that an engine computes at once; longer rows go in chunks. Scoring on CPU holds 9 bytes × vocabulary size
    for each of them: left out, so many there as 1 GiB holds (128 to 4096). Otherwise left out: vLLM's own number."""


class Reference(Section):
    """Log-probs of the model before training, which losses compare with."""

    engine: Literal["vllm", "torch", "auto"] = "vllm"
    """Who computes the reference log-probs: vLLM, or the trainer's own forward in Ray actors. auto: vLLM if it is
    installed and agrees with the trainer's forward within the tolerance, or else torch; decided once for a model."""
    tolerance: Tolerance = Tolerance()
    """Calibration gate: how far the reference log-probs may be from those of the trainer's own forward."""
    calibration_pairs: int = Field(32, ge=1)
    """Pairs, drawn from all of them, that both engines score for the calibration gate: some before the pass where vLLM
    makes it, and others after it."""


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
    adamw_8bit: the moments in 8 bits, in blocks of 256 (arXiv:2110.02861), 10 bytes. adamw_bf16: all in bfloat16, the
    weight rounded up or down at random so that small steps are not lost (arXiv:2010.06192), 8 bytes.
    adamw_8bit_bf16: both, 6 bytes. By torchao, of the extra `memory`."""
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


BASE_MODEL = "the base model"
"""What `model` is called where others are compared with it."""

SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
"""How a set of held-out pairs is called."""


class Opponent(Section):
    """A model that the tuned one is compared with."""

    path: str
    """As model.path."""
    revision: str | None = None
    """As model.revision."""
    trust_remote_code: bool = False
    """As model.trust_remote_code."""
    chat_template: str | None = None
    """As model.chat_template."""
    template_arguments: dict[str, Any] = Field(default_factory=dict)
    """As model.template_arguments."""

    def model(self) -> Model:
        """As the section `model` would name it."""
        return Model(**dict(self))


class WinRate(Section):
    """Sampled answers of the tuned model against another one's."""

    against: Opponent | None = None
    """Whose answers the tuned model's are compared with; left out: the base model's, `model` itself."""
    sampling: Sampling = Sampling()
    """How completions are drawn from the tuned model and from the other one."""
    reward: Reward = _BRIEF_ANSWER
    """Who judges: module:function, a source, or a list of sources with weights."""
    max_prompts: int = Field(256, ge=1)
    """At most so many held-out prompts, the first by prompt id."""

    @property
    def opponent(self) -> str:
        """What the other model is called."""
        return PurePath(self.against.path).name if self.against is not None else BASE_MODEL


class Tasks(Section):
    """Benchmark tasks of lm-evaluation-harness (the extra `tasks`)."""

    names: tuple[str, ...] = Field(min_length=1)
    """Its tasks, tags and groups, as `lm-eval ls tasks` lists them, or those of include_path."""
    include_path: str | None = None
    """A folder with task files (YAML) of your own, seen by every node; null: the library's tasks alone."""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples before each question; null: each task's own number. A task whose own is 0 keeps it."""
    limit: int | None = Field(None, ge=1)
    """Only the first so many documents of a task, or of each task of a group; null: all."""
    batch_size: int = Field(8, ge=1)
    """Sequences that the model computes at once."""

    @model_validator(mode="after")
    def _once(self) -> Tasks:
        if twice := [name for name, count in Counter(self.names).items() if count > 1]:
            raise ValueError(f"evaluate.tasks.names has {twice[0]} twice: name each task once")
        return self


class Evaluate(Section):
    """What is measured of the tuned model, beside its accuracy on held-out pairs."""

    sets: dict[SetName, Paths] = Field(default_factory=dict)
    """Further held-out preference data by names of your own, such as the files of RewardBench: on each the accuracy is
    measured. Named like data.train; read by their own columns (prompt, chosen, rejected and so on)."""
    win_rate: WinRate | None = None
    """Tuned against base, or another model, on held-out prompts; left out: not measured."""
    max_pairs: int = Field(100_000, ge=1)
    """Held-out pairs that the accuracy is measured on, about, at most: drawn at random, the same ones each time. So
    many give it to within 0.3%."""
    tasks: Tasks | None = None
    """Base and tuned model on benchmark tasks; left out: not measured."""


class Gate(Section):
    """Conditions, each of which must hold for a model to become the latest one."""

    accuracy_above: float | None = Field(0.5, ge=0.0, lt=1.0)
    """The lower end of the interval of the held-out accuracy must lie above this; null: not required."""
    win_rate_above: float | None = Field(None, ge=0.0, lt=1.0)
    """The lower end of the interval of the win rate must lie above this; null: not required."""
    length_controlled_win_rate_above: float | None = Field(None, ge=0.0, lt=1.0)
    """The same of the win rate that would be at answers of equal length; null: not required."""
    kl_below: float | None = Field(None, gt=0.0)
    """The upper end of the interval of the KL from the base model, in nats a token, must lie below this; null: not
    required."""
    chosen_drop_below: float | None = Field(None, gt=0.0)
    """Nats by which the summed log-probs of held-out chosen answers may have fallen: the upper end of the interval of
    their mean fall must lie below this; null: not required."""
    length_ratio_within: tuple[float, float] | None = None
    """Tokens of sampled answers for each token of the other model's (evaluate.win_rate.against): the interval must lie
    within these two; null: not required."""

    no_regression: dict[str, Annotated[float, Field(gt=0.0, lt=1.0)]] = Field(default_factory=dict)
    """Set → by how much its accuracy may be below that of the model that is published now: the lower end of the
    interval of the change must lie above minus this. A set of evaluate.sets, or held_out, the run's own. Where nothing
    is published yet the condition holds."""

    @property
    def asks_for_samples(self) -> list[str]:
        """The conditions that need sampled answers."""
        named = ("win_rate_above", "length_controlled_win_rate_above", "kl_below", "length_ratio_within")
        return [name for name in named if getattr(self, name) is not None]

    @model_validator(mode="after")
    def _ordered(self) -> Gate:
        if self.length_ratio_within is not None and not 0 < self.length_ratio_within[0] < self.length_ratio_within[1]:
            raise ValueError(
                f"publish.gate.length_ratio_within={list(self.length_ratio_within)} holds no ratio: name two, the "
                "smaller first, such as [0.5, 1.5]"
            )
        return self


class Publish(Section):
    """What is published."""

    gate: Gate = Gate()
    """What a model must show before it is published."""
    push_to_hub: PushToHub | None = None
    """Where on the Hugging Face Hub it goes then; left out: nowhere."""


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
