"""The sweep: trials over the space, the best of them again with other seeds, and their order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dpo_ray.config import Config
from dpo_ray.errors import Busy, ConfigError, DpoRayError
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.on_ray.room import Need
from dpo_ray.on_ray.session import connect, is_embedded, nodes, num_cores
from dpo_ray.on_ray.trainer import tokens_per_microbatch, tokens_per_second, train_location, training_lease
from dpo_ray.progress import Progress, say
from dpo_ray.storage.artifact import MANIFEST, Artifact, digest
from dpo_ray.storage.location import Location
from dpo_ray.tracking.tracker import State
from dpo_ray.training.index import PlanIndex
from tuning.estimate import estimate_lines, load_of
from tuning.live import status_note
from tuning.measures import score
from tuning.on_tune import (
    Listener,
    Past,
    forgotten_groups,
    give_back,
    make_scheduler,
    places,
    run_trials,
)
from tuning.preparations import preparation_key, preparations
from tuning.records import Evaluation, Records, Trial, identity
from tuning.results import Ranked, described, measured_line, ranked
from tuning.space import Point, extreme_configs, trial_config
from tuning.suggestions import next_point, num_trials
from tuning.tracked import TrackedTrials
from tuning.trial import Ended, Work

STAGE = "sweep"

_STATES: dict[str, State] = {"finished": "finished", "stopped": "stopped"}
"""Of trials that have ended, as trackers have them; the others have failed."""
_DRAWS = 100  # of a point that is none of those before
_EVALUATIONS = 4  # of a trial, where the configuration does not say how often


@dataclass(frozen=True)
class Outcome:
    """What a sweep came to."""

    trials: list[Trial]
    """Of the search, by number."""
    repeats: list[Trial]
    """The best ones with other seeds."""
    ranking: list[Ranked]
    at_once: int
    seconds: float
    """Of this run."""


class Sweep:
    """One sweep: its configuration, what its trials train on, and its records.

    Args:
        rows: key of a preparation (tuning.space) → what its trials train on.
        indices: the same keys → the index of their training pairs, and of the held-out ones that trials are ranked on.
        show: called with all trials whenever one has come further.
        tracked: told of each trial that begins or ends, for the trackers.
    """

    def __init__(
        self,
        output: Location,
        config: Config,
        rows: Mapping[str, Artifact],
        indices: Mapping[str, tuple[PlanIndex, PlanIndex]],
        show: Callable[[Sequence[Trial]], None],
        tracked: TrackedTrials | None = None,
    ) -> None:
        assert config.tune is not None
        self.output, self.config, self.tune = output, config, config.tune
        self.rows, self.indices, self.show, self.tracked = rows, indices, show, tracked
        weights = {ModelFolder.of(one.model).weights_hash() for one in preparations(config).values()}
        self.records = Records.of(output, identity(config, {made.fingerprint for made in rows.values()}, weights))
        self.num_trials = num_trials(self.tune)
        self._microbatch: dict[str, int] = {}
        self._at_once = 1

    def trials(self) -> list[Trial]:
        """Of the search, those that are known; a sweep that is narrowed again leaves out the last ones."""
        return [t for t in self.records.search(self.config.run.seed) if t.number < self.num_trials]

    def config_of(self, trial: Trial) -> Config:
        """The configuration that a trial trains by, and that makes its model again. Raises ConfigError."""
        config = trial_config(self.config, trial.point)
        if config.train.eval_every_steps is None:
            every = max(1, math.ceil(self.num_steps(config) / _EVALUATIONS))
            config = _with_train(config, eval_every_steps=every)
        return config.model_copy(update={"run": config.run.model_copy(update={"seed": trial.seed})})

    def num_steps(self, config: Config) -> int:
        """Of a trial. Raises ConfigError where its pairs do not fill a step."""
        pairs = len(self.indices[preparation_key(config)][0])
        steps = pairs * config.train.epochs // config.train.global_batch_size
        if steps == 0:
            raise ConfigError(
                f"There are {pairs} training pairs, which do not fill one step of train.global_batch_size="
                f"{config.train.global_batch_size}. Lower the batch size or add data."
            )
        return steps

    def run(self) -> Outcome:
        """Run what is missing."""
        began = time.monotonic()
        known = self.trials()
        ended = sum(t.has_ended for t in known)
        say(
            STAGE,
            f"{self.num_trials} trials, records in {self.records.folder}"
            + (f"; {ended} have ended, {len(known) - ended} go on" if known else ""),
        )
        if ended < self.num_trials:
            self._connect(self.num_trials - ended)
            self._say_cost(self.num_trials - ended)
            self._run(self._search(), schedules=True, total=self.num_trials - ended)
        ranking = self._ranking([])
        repeats: list[Trial] = []
        if self.tune.repeat_best is not None and ranking:
            best = [one.trial for one in ranking[: self.tune.repeat_best.k]]
            repeats = self._repeats(best)
            missing = [t for t in repeats if not t.has_ended]
            if missing:
                self._connect(len(missing))
                say(STAGE, f"the best {len(best)} again, each with {self.tune.repeat_best.seeds} other seeds")
                self._run(iter(missing), schedules=False, total=len(missing))
            ranking = self._ranking(repeats)
        self._prune(ranking)
        return Outcome(self.trials(), repeats, ranking, self._at_once, time.monotonic() - began)

    def nothing_finished(self, outcome: Outcome) -> DpoRayError:
        """What to raise where no trial came to its end."""
        reasons = [t.reason for t in outcome.trials if t.reason]
        return DpoRayError(
            f"None of the {len(outcome.trials)} trials came to its end"
            + (f"; the first one: {reasons[0]}" if reasons else ".")
            + f" Their records are in {self.records.folder}; the same command tries those that failed again."
        )

    def _ranking(self, repeats: Sequence[Trial]) -> list[Ranked]:
        return ranked(self.tune, self.trials(), repeats)

    def _search(self) -> Iterator[Trial]:
        """Those that a kill or a failure has left, then new ones."""
        seed = self.config.run.seed
        known = {t.number: t for t in self.trials()}
        yield from (t for t in known.values() if not t.has_ended)
        drawn = {self._learns(t.point) for t in known.values()}
        for number in range(self.num_trials):
            if number in known:
                continue
            point = self._new_point(number, drawn)
            if point is not None:
                yield self.records.get(number, seed, point)

    def _new_point(self, number: int, drawn: set[str]) -> Point | None:
        """One whose training is none of those drawn, which it is added to; None where there are no others.

        Two trainings alike would be one, and side by side destroy each other's files.
        """
        for again in range(_DRAWS):
            point = next_point(self.config, number, self.records.search(self.config.run.seed), again)
            learns = self._learns(point)
            if learns not in drawn:
                drawn.add(learns)
                return point
            if self.tune.search == "grid":
                break
        say(STAGE, f"trial {number} is left out: every point that is drawn for it is one of those before")
        return None

    def _learns(self, point: Point) -> str:
        try:
            config = trial_config(self.config, point)
        except ConfigError:  # it is told when the trial is to begin
            return digest(point)
        return digest([config.train.identity(), config.model.model_dump(mode="json"), preparation_key(config)])

    def _repeats(self, best: Sequence[Trial]) -> list[Trial]:
        assert self.tune.repeat_best is not None
        seeds = range(self.config.run.seed + 1, self.config.run.seed + 1 + self.tune.repeat_best.seeds)
        return [self.records.get(trial.number, seed, trial.point) for trial in best for seed in seeds]

    def _connect(self, open_trials: int) -> None:
        train = self.config.train
        cpus = train.num_workers * train.cpus_per_worker
        wanted = self.tune.max_concurrent_trials or (max(1, int(num_cores() // cpus)) if is_embedded() else 1)
        wanted = min(wanted, open_trials)
        connect(trials_need(self.config, wanted), trains=True)
        if self.tune.max_concurrent_trials is None and not is_embedded():
            wanted = min(places(nodes(), trials_need(self.config, 1)), open_trials)
        self._at_once = wanted

    def _say_cost(self, open_trials: int) -> None:
        configs = extreme_configs(self.config)
        loads = [load_of(one, self.num_steps(one), *self.indices[preparation_key(one)]) for one in configs]
        first = configs[0]
        rate = tokens_per_second(first, self.indices[preparation_key(first)][0])
        scored = [made for made in self.rows.values() if made.manifest.kind != "tokenized"]
        for line in estimate_lines(
            self.config,
            loads,
            open_trials=open_trials,
            at_once=self._at_once,
            tokens_per_second=rate,
            rows_scored=scored[0].manifest.rows or 0 if scored else 0,
            preparations=len(scored),
        ):
            say(STAGE, line)

    def _run(self, trials: Iterator[Trial], *, schedules: bool, total: int) -> None:
        watch = _Watch(self, total)
        scheduler = make_scheduler(
            self.tune.scheduler if schedules else None,
            eval_every_steps=self.config.train.eval_every_steps or 1,
            num_steps=max(map(self.num_steps, extreme_configs(self.config))),
            past=[self._past(trial) for trial in self.trials() if trial.evaluations],
        )
        run_trials(
            watch.works(trials),
            scheduler=scheduler,
            output=self.output,
            rows=self.rows,
            at_once=self._at_once,
            max_failures=self.tune.max_failures,
            storage=self.records.folder,
            listener=watch,
        )
        left = forgotten_groups()
        for group in left:
            give_back(group)
        if left:
            say(STAGE, f"{len(left)} placement groups of trials that had died were given back")

    def _past(self, trial: Trial) -> Past:
        objective = self.tune.objectives()[0]
        scored = [(e["step"], score(objective, e["measured"])) for e in trial.evaluations]
        last = trial.num_steps or math.inf
        return Past(trial.name, tuple((step, found[0]) for step, found in scored if found is not None and step < last))

    def work_of(self, trial: Trial) -> Work:
        """What its process is given. Raises ConfigError."""
        config = self.config_of(trial)
        trial.num_steps = self.num_steps(config)
        return Work(
            name=f"trial {trial.number}" + f", seed {trial.seed}" * (trial.seed != self.config.run.seed),
            config=config,
            rows=preparation_key(config),
            objective=self.tune.objectives()[0],
            num_steps=trial.num_steps,
            tokens_per_microbatch=self._tokens(config),
            evaluated=tuple(trial.evaluations),
        )

    def _tokens(self, config: Config) -> int:
        """Found out once for all trials that hold as much, not in each: it takes seconds."""
        train = config.train
        key = f"{config.model.model_dump_json()} {train.optimizer} {train.ema_decay is not None}"
        if key not in self._microbatch:
            self._microbatch[key] = tokens_per_microbatch(config)
        return self._microbatch[key]

    def _prune(self, ranking: Sequence[Ranked]) -> None:
        """Remove what nothing needs any more: checkpoints of trials that did not finish, models of those that are not
        among the best. What was there before the sweep stays."""
        kept = {t.policy for one in ranking[: self.tune.keep_models] for t in (one.trial, *one.repeats)}
        for trial in list(self.records.trials.values()):
            if trial.number >= self.num_trials:
                continue  # of the sweep before it was narrowed; it may be widened again
            location = self._train_location(trial)
            if location is None:
                continue
            try:
                # Another run may be at the same training, and go on from what this one has left of it.
                with training_lease(self.output, location, run_id=STAGE, when_busy="leave"):
                    self._remove_training(trial, location, kept)
            except Busy:
                continue

    def _remove_training(self, trial: Trial, location: Location, kept: Collection[str | None]) -> None:
        if trial.state in {"stopped", "diverged"}:
            (location / "checkpoints").remove_folder()
            if not (location / MANIFEST).exists():
                location.remove_folder()
        elif trial.state == "finished" and trial.was_trained and trial.policy not in kept:
            (location / MANIFEST).remove()  # from here on it is unfinished, and would be computed again
            location.remove_folder()
            # Who makes it again, another run or this one when it is widened, owns it then.
            self.records.write(trial.model_copy(update={"was_trained": False}))

    def track(self, trial: Trial) -> None:
        """Have the trackers follow a trial that begins."""
        location = self._train_location(trial)
        if self.tracked is not None and location is not None:
            self.tracked.begins(trial.name, self.config_of(trial), location)

    def _train_location(self, trial: Trial) -> Location | None:
        try:
            config = self.config_of(trial)
        except ConfigError:
            return None
        rows = self.rows.get(preparation_key(config))
        return train_location(self.output, config, rows) if rows is not None else None


def trials_need(config: Config, at_once: int) -> Need:
    """Of trials side by side."""
    train = config.train
    return Need(
        "tune.max_concurrent_trials trials at once, each with train.num_workers workers",
        processes=at_once * train.num_workers,
        cpus=train.cpus_per_worker,
        gpus=train.gpus,
        place=config.placement.training,
    )


class _Watch(Listener):
    """Writes down what becomes of trials, and tells it."""

    def __init__(self, sweep: Sweep, total: int) -> None:
        self._sweep = sweep
        self._named: dict[str, Trial] = {}
        self._before: dict[str, float] = {}
        self._progress = Progress(STAGE, total, "trials")

    def works(self, trials: Iterator[Trial]) -> Iterator[Work]:
        for trial in trials:
            try:
                work = self._sweep.work_of(trial)
            except ConfigError as error:  # ends of ranges were tried before, not what lies between
                trial.state, trial.reason = "failed", str(error)
                self._changed(trial, f"cannot be trained: {error}", ended=True)
                continue
            self._named[work.name] = trial
            self._before[work.name] = trial.seconds
            yield work

    def begins(self, name: str) -> None:
        trial = self._named[name]
        self._before[name] = trial.seconds
        goes_on = f", goes on after step {trial.step}" if trial.step else ""
        trial.state, trial.reason = "training", None
        self._sweep.track(trial)
        self._changed(trial, f"{described(self._sweep.tune, trial)}{goes_on}")

    def evaluated(self, name: str, evaluation: Evaluation, seconds: float) -> None:
        trial = self._named[name]
        trial.seconds = self._before[name] + seconds
        self._sweep.records.evaluated(trial, evaluation)
        self._changed(trial)

    def ended(self, name: str, result: Ended, seconds: float) -> None:
        trial = self._named[name]
        trial.seconds = self._before[name] + seconds
        trial.state, trial.reason = result["state"], result["reason"]
        if result["state"] != "finished":
            trial.measured = {}
            self._changed(trial, f"{result['state']} after step {trial.step}: {result['reason']}", ended=True)
            return
        trial.policy, trial.was_trained = result["policy"], trial.was_trained or result["was_trained"]
        trial.first_step_loss = result["first_step_loss"]
        trial.evaluations = result["evaluations"]
        trial.step = trial.num_steps = result["num_steps"] or 0
        published = [e for e in trial.evaluations if e["step"] == result["published_step"]]
        trial.measured = (published or trial.evaluations)[-1]["measured"]
        self._changed(trial, f"finished: {measured_line(trial.measured)}", ended=True)

    def stopped(self, name: str, seconds: float) -> None:
        trial = self._named[name]
        trial.seconds, trial.state = self._before[name] + seconds, "stopped"
        trial.reason = f"{self._sweep.tune.scheduler.type}: others were better after step {trial.step}"
        text = f"ended by {self._sweep.tune.scheduler.type} after step {trial.step} of {trial.num_steps}"
        self._changed(trial, text, ended=True)

    def failed(self, name: str, reason: str, *, again: bool) -> None:
        trial = self._named[name]
        trial.state, trial.reason = "failed", reason
        self._changed(trial, f"failed{', and is tried again' if again else ''}: {reason}", ended=not again)

    def _changed(self, trial: Trial, text: str | None = None, *, ended: bool = False) -> None:
        sweep = self._sweep
        sweep.records.write(trial)
        if ended and sweep.tracked is not None:
            sweep.tracked.ended(trial.name, _STATES.get(trial.state, "failed"))
        if text is not None:
            seed = f", seed {trial.seed}" if trial.seed != sweep.config.run.seed else ""
            say(STAGE, f"trial {trial.number}{seed}: {text}")
        trials = list(sweep.records.trials.values())
        sweep.show(trials)
        self._progress.advance(int(ended), status_note(sweep.tune, trials))


def _with_train(config: Config, **values: object) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=values)})
