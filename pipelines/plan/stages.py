"""The plan: stage by stage what a run will take, each number with where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from dpo_ray.config import Config, NodeChoice
from dpo_ray.errors import ConfigError
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.on_ray.pool import Pool, rows_pool, torch_pool
from dpo_ray.on_ray.room import Need
from dpo_ray.on_ray.session import is_embedded, num_cores
from dpo_ray.on_ray.trainer import training_need
from dpo_ray.on_ray.vllm_engine import vllm_pool
from dpo_ray.on_ray.vllm_version import has_vllm
from dpo_ray.shards.ingest import IngestShard
from dpo_ray.storage.artifact import Manifest
from dpo_ray.training.flops import FORWARD, ModelShape, passes
from dpo_ray.training.memory import Shape, shape_of, worker_memory
from dpo_ray.training.plan import StepPlan
from pipelines import planned
from pipelines.plan.counts import Counts, Side, exact
from pipelines.plan.memory import Memory, of_scoring, of_training, resident
from pipelines.plan.reached import Reached, reached
from pipelines.plan.sample import of_prompts, sample
from pipelines.plan.speeds import Stated, Trained, measured_rate, measured_training

_CARRIES_ROWS = ("ingest", "tokenize")
_TERA = 1e12


@dataclass(frozen=True)
class Stage:
    """What one stage will take."""

    name: str
    state: str
    """reused, to do, or how much of it is left."""
    left: float
    """Share of it that is to be computed."""
    rows: float | None
    tokens: float | None
    """A prompt once for each of its completions; over all epochs."""
    memory: Memory | None
    processes: int
    gpus: float
    """Of all processes together."""
    placement: str
    seconds: float | None
    """Of what is left; None: nobody knows."""
    why: str
    """Where the time comes from, or what it would come from."""

    @property
    def hours(self) -> float | None:
        """GPU hours, or hours of processes where no GPU is used."""
        return None if self.seconds is None else self.seconds / 3600 * (self.gpus or self.processes)


@dataclass(frozen=True)
class Plan:
    """Of a run."""

    stages: tuple[Stage, ...]
    counts: Counts
    reached: Reached
    price: float | None
    """Of an hour, as Stage.hours counts them."""

    @property
    def lacking(self) -> list[Stage]:
        """The stages that do not fit, as far as it is known."""
        return [stage for stage in self.stages if stage.memory is not None and stage.memory.lacking is not None]

    def cost(self, stage: Stage) -> float | None:
        """In the unit of the price."""
        return None if self.price is None or stage.hours is None else self.price * stage.hours


def make_plan(
    config: Config, *, rows: int, stated: Stated, memory: int | None = None, price: float | None = None
) -> Plan:
    """Count, compute nothing.

    Args:
        rows: of the source that are sampled where nothing is tokenized yet.
        memory: bytes of a training worker, and of a GPU; None: what is found here, where the work will be here.
        price: of a GPU's hour; of a process's hour where there is none.

    Raises ConfigError and DataError where a run would meet them.
    """
    found = reached(config)
    made = [found.finished[name] for name in ("mismatched", "reference", "tokenize") if name in found.finished]
    if made:
        counts = exact(config, made[0])
    elif config.generate is not None:
        counts = of_prompts(config, rows)
    else:
        counts = sample(config, rows)
    estimate = _Estimate(config, counts, found, stated, memory)
    return Plan(tuple(estimate.stages()), counts, found, price)


class _Estimate:
    def __init__(self, config: Config, counts: Counts, found: Reached, stated: Stated, memory: int | None) -> None:
        from transformers import AutoConfig

        self.config, self.counts, self.found, self.stated = config, counts, found, stated
        folder = ModelFolder.of(config.model)
        self.shape: Shape = shape_of(folder)
        whole = AutoConfig.from_pretrained(folder.description, trust_remote_code=folder.trust_remote_code)
        self.matrices = ModelShape.of(whole, trust_remote_code=folder.trust_remote_code)
        self.process = 0 if config.train.use_gpu else resident()
        self.memory = memory if memory is not None else self._memory_here()
        self.trained = measured_training(config) if stated == Stated() else None
        pairs = max(1.0, counts.train.pairs)
        size = config.train.global_batch_size
        self.num_steps = int(pairs * config.train.epochs // size)
        self.epochs = self.num_steps * size / pairs  # the last pairs of the last epoch may fill no step

    def stages(self) -> Iterator[Stage]:
        plan = planned(self.config, "publish")
        parts = {
            "ingest": self._ingest,
            "generate": self._generate,
            "tokenize": self._tokenize,
            "reference": self._reference,
            "train": self._train,
            "evaluate": self._evaluate,
        }
        for name in plan:
            if name in parts:
                yield parts[name]()

    def _memory_here(self) -> int | None:
        """Of a training worker on this machine, where it would run here."""
        train = self.config.train
        if not is_embedded():
            return None
        if train.use_gpu:
            from dpo_ray.machine import told_by_driver

            gpus, _ = told_by_driver()
            return min((int(gpu.memory * train.gpus) for gpu in gpus if gpu.memory is not None), default=None)
        return worker_memory(train.num_workers, 0)

    def _state(self, name: str) -> tuple[str, float]:
        """How a stage stands, and the share of it that is left."""
        found = self.found
        if found.at != name:
            return ("reused", 0.0) if name in found.finished else ("to do", 1.0)
        if found.step is not None:
            return f"goes on after step {found.step}", max(0.0, 1 - found.step / max(1, self.num_steps))
        if found.shards is not None and found.shards[0]:
            done, of = found.shards
            return f"{of - done} of {of} shards", 1 - done / of
        return "to do", 1.0

    def _rows_stage(self, name: str, kind: str, rows: float, matches: Callable[[Manifest], bool]) -> Stage:
        """A stage that only carries rows, by as many workers as there are cores."""
        state, left = self._state(name)
        pool = rows_pool(self.config, IngestShard, {})
        workers = num_cores() if is_embedded() else 1
        rate = measured_rate(self.config, kind, matches, 0) if left else None
        seconds, why = 0.0 if not left else None, "nothing is computed" if not left else "unknown: no earlier run here"
        if rate is not None:
            seconds, why = left * rows / rate.rows_per_second / workers, rate.source
        place = f"{workers} × 1 CPU" if is_embedded() else "as many × 1 CPU as there is room for (time: of one)"
        place += _on(pool.place)
        return Stage(name, state, left, rows, None, None, workers, pool.num_gpus, place, seconds, why)

    def _ingest(self) -> Stage:
        return self._rows_stage("ingest", "pairs", self.counts.read, lambda manifest: True)

    def _tokenize(self) -> Stage:
        tokenizer = ModelFolder.of(self.config.model).tokenizer_hash()
        pairs = self.counts.train.pairs + self.counts.held_out.pairs
        stage = self._rows_stage(
            "tokenize", "tokenized", pairs, lambda manifest: manifest.identity["tokenizer"] == tokenizer
        )
        return replace(stage, tokens=self.counts.train.tokens + self.counts.held_out.tokens)

    def _generate(self) -> Stage:
        options = self.config.generate
        assert options is not None
        state, left = self._state("generate")
        prompts = self.counts.read
        drawn = prompts * options.samples
        prompt = self.counts.train.tokens_once / max(1.0, self.counts.train.pairs) - 2 * options.sampling.max_tokens
        tokens = prompts * max(0.0, prompt) + drawn * options.sampling.max_tokens
        need = vllm_pool(self.config, IngestShard, {})
        flops = 2.0 * self.shape.parameters * tokens
        engine = of_scoring(self.config, self.shape, self.process, by_vllm=True, gpu=self._gpu())
        return self._model_stage(
            "generate", state, left, drawn, tokens, engine, need, flops, "candidates", lambda manifest: True
        )

    def _reference(self) -> Stage:
        config, counts = self.config, self.counts
        state, left = self._state("reference")
        if self.found.at == "mismatched":
            state, left = "mismatched to do", 1.0
        elif self.found.at == "calibrate":
            state = "calibration to do"
        by_vllm = config.reference.engine == "vllm" or (config.reference.engine == "auto" and has_vllm())
        pool = vllm_pool(config, IngestShard, {}) if by_vllm else torch_pool(config, IngestShard, {})
        weights = ModelFolder.of(config.model).weights_hash()
        engine = "vllm" if by_vllm else "torch"

        def same(manifest: Manifest) -> bool:
            found = manifest.identity
            return (found["weights"], found["dtype"], found["engine"]) == (weights, config.model.dtype, engine)

        pairs = counts.train.pairs + counts.held_out.pairs
        tokens = counts.train.tokens + counts.held_out.tokens
        flops = FORWARD * (counts.train.flops(self.matrices) + counts.held_out.flops(self.matrices))
        memory = of_scoring(config, self.shape, self.process, by_vllm=by_vllm, gpu=self._gpu())
        return self._model_stage("reference", state, left, pairs, tokens, memory, pool, flops, "reference", same)

    def _evaluate(self) -> Stage:
        config, counts = self.config, self.counts
        state, left = self._state("evaluate")
        share = min(1.0, config.evaluate.max_pairs / max(1.0, counts.held_out.pairs))
        flops = share * FORWARD * counts.held_out.flops(self.matrices)
        pool = torch_pool(config, IngestShard, {})
        memory = of_scoring(config, self.shape, self.process, by_vllm=False, gpu=self._gpu())
        stage = self._model_stage(
            "evaluate", state, left, share * counts.held_out.pairs, share * counts.held_out.tokens, memory, pool, flops,
            "policy_scores", lambda manifest: manifest.identity["dtype"] == config.model.dtype,
        )  # fmt: skip
        left_out = [
            what
            for what, asked in (
                ("evaluate.win_rate", config.evaluate.win_rate),
                ("evaluate.tasks", config.evaluate.tasks),
                ("evaluate.sets", config.evaluate.sets),
            )
            if asked
        ]
        return replace(stage, why=f"{stage.why}; without {' and '.join(left_out)}" if left_out else stage.why)

    def _model_stage(
        self,
        name: str,
        state: str,
        left: float,
        rows: float,
        tokens: float,
        memory: Memory,
        pool: Pool,
        flops: float,
        kind: str,
        matches: Callable[[Manifest], bool],
    ) -> Stage:
        """A stage in which engines go over rows."""
        workers = pool.num_actors or 1
        rate = measured_rate(self.config, kind, matches, pool.num_gpus) if left and self.stated == Stated() else None
        seconds: float | None
        if not left:
            seconds, why = 0.0, "nothing is computed"
        elif rate is not None:
            seconds, why = left * rows / rate.rows_per_second / workers, rate.source
        else:
            seconds, why = self._by_flops(left * flops, workers)
        place = _place(workers, pool.num_cpus, pool.num_gpus, pool.place)
        return Stage(name, state, left, rows, tokens, memory, workers, workers * pool.num_gpus, place, seconds, why)

    def _train(self) -> Stage:
        config, counts, train = self.config, self.counts, self.config.train
        if not self.num_steps:
            raise ConfigError(
                f"There are about {counts.train.pairs:.0f} training pairs and train.epochs={train.epochs}, which does "
                f"not fill one step of train.global_batch_size={train.global_batch_size}. Lower the batch size or add "
                "data."
            )
        state, left = self._state("train")
        tokens = self._trained_tokens()
        evaluated = 0.0
        if train.eval_every_steps is not None:
            share = min(1.0, train.eval_pairs / max(1.0, counts.held_out.pairs))
            evaluated = -(-self.num_steps // train.eval_every_steps) * share
        flops = self.training_flops + FORWARD * evaluated * counts.held_out.flops(self.matrices)
        memory = of_training(config, self.shape, counts.train, counts.index, self.memory, self.process)
        need: Need = training_need(config)
        seconds: float | None
        if not left:
            seconds, why = 0.0, "nothing is computed"
        elif self.trained is not None:
            rate = self.trained.tokens_per_second * train.num_workers
            work = tokens + FORWARD * evaluated * counts.held_out.tokens
            seconds = self.trained.beside_steps + left * work / rate
            why = f"{self.trained.source}, and its {self.trained.beside_steps:.0f} s beside the steps"
        else:
            seconds, why = self._by_flops(left * flops, train.num_workers)
        place = _place(train.num_workers, train.cpus_per_worker, train.gpus, need.place)
        if train.min_workers is not None:
            place = f"{need.processes} to {place}"
        rows = self.num_steps * train.global_batch_size
        return Stage(
            "train", state, left, rows, tokens, memory, train.num_workers, train.num_workers * train.gpus, place,
            seconds, why,
        )  # fmt: skip

    def _trained_tokens(self) -> float:
        """Of all steps; exactly where the pairs are known that the last epoch leaves out. With weights a source counts
        by the mean of its pairs; before they are tokenized, by the mean of all."""
        counts, train, weights = self.counts, self.config.train, self.config.data.weights
        if counts.index is None:
            return self.epochs * counts.train.tokens
        index, seed = counts.index, self.config.run.seed
        steps = StepPlan(index, train.global_batch_size, train.epochs, seed, hidden_size=1, weights=weights)
        if weights is not None:
            return sum(
                of_source["passes"] * Side(index.lengths[index.pairs_of(index.shards_of(name))]).tokens
                for name, of_source in steps.trained().items()
            )
        return train.epochs * counts.train.tokens - Side(counts.index.lengths[steps.left_out()]).tokens

    @property
    def training_flops(self) -> float:
        """Of all steps."""
        whole = self.epochs * self.counts.train.flops(self.matrices)
        return passes(self.config.train, self.config.model.lora) * whole

    def _by_flops(self, flops: float, processes: int) -> tuple[float | None, str]:
        """Seconds of so many processes, where something tells how fast one of them is."""
        stated = self.stated
        if stated.mfu is not None and stated.peak_tflops is not None:
            rate = stated.mfu * stated.peak_tflops * _TERA
            how = f"stated: --mfu {stated.mfu:g} of --peak-tflops {stated.peak_tflops:g}"
            return flops / rate / processes, f"{flops / _TERA:.3g} TFLOP; {how}"
        tokens = self._trained_tokens()
        if stated.tokens_per_second is not None:
            rate = self.training_flops / (tokens / stated.tokens_per_second) / self.config.train.num_workers
            return flops / rate / processes, f"stated: --tokens-per-second {stated.tokens_per_second:g} of the training"
        trained = self.trained
        if isinstance(trained, Trained):
            rate = self.training_flops / (tokens / trained.tokens_per_second)
            return flops / rate / processes, f"by operations, from the training: {trained.source}"
        return None, (
            f"{flops / _TERA:.3g} TFLOP; no earlier run in this output tells how fast they are: state "
            "--tokens-per-second, or --mfu with --peak-tflops"
        )

    def _gpu(self) -> int | None:
        """Bytes of one, where GPUs are used and it is known."""
        train = self.config.train
        return int(self.memory / train.gpus) if train.use_gpu and self.memory is not None else None


def _place(processes: int, cpus: float, gpus: float, place: NodeChoice) -> str:
    of_gpu = f" and {gpus:g} GPU" if gpus else ""
    return f"{processes} × {cpus:g} CPU{of_gpu}{_on(place)}"


def _on(place: NodeChoice) -> str:
    return f" on {place}" if place.options else ""


def as_dict(plan: Plan) -> dict[str, Any]:
    """For programs."""
    stages = [
        {
            "stage": stage.name,
            "state": stage.state,
            "left": stage.left,
            "rows": stage.rows,
            "tokens": stage.tokens,
            "memory_bytes": stage.memory and stage.memory.bytes,
            "memory_of": stage.memory and stage.memory.parts,
            "memory_there": stage.memory and stage.memory.has,
            "fits": None if stage.memory is None or stage.memory.has is None else stage.memory.lacking is None,
            "knob": stage.memory and stage.memory.knob,
            "processes": stage.processes,
            "gpus": stage.gpus,
            "placement": stage.placement,
            "seconds": stage.seconds,
            "hours": stage.hours,
            "cost": plan.cost(stage),
            "from": stage.why,
        }
        for stage in plan.stages
    ]
    counts = plan.counts
    return {
        "stages": stages,
        "exact": counts.exact,
        "counted": counts.how,
        "pairs": {"train": counts.train.pairs, "held_out": counts.held_out.pairs},
        "price_per_hour": plan.price,
    }
