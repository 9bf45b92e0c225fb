"""The section `data`."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dpo_ray.config.losses import Judged
from dpo_ray.config.pairing import Pairing
from dpo_ray.config.section import Section
from dpo_ray.config.sources import DataSource, Paths, TrainData, require_a_mixture
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
