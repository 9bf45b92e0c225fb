"""The rows that stages hand to each other, and their Arrow schemas."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, Literal, NotRequired, TypedDict, TypeVar

import pyarrow as pa

Split = Literal["train", "eval"]

Value = TypeVar("Value")


class Message(TypedDict):
    """One turn of a dialogue."""

    role: str
    """system, user, assistant or tool."""
    content: str
    """Empty where the message has no text."""
    more: NotRequired[str | None]
    """JSON text of what else the chat template is shown of the message, by the template's names, such as tool_calls;
    absent or None: nothing."""


Answer = str | tuple[Message, ...]
"""What the assistant said: text, which is one turn of nothing else; or its turns with what tools and the user said
between them, from its first to its last."""


@dataclass(frozen=True)
class PreferencePair:
    """A dialogue up to where the assistant is to speak, and two answers to it.

    Unpaired preference data (a single answer, judged) are pairs with one side: a desirable answer is `chosen` and
    `rejected` is None; an undesirable one is `rejected` and `chosen` is None.
    """

    prompt: tuple[Message, ...]
    chosen: Answer | None
    rejected: Answer | None
    tools: str | None = None
    """The tools that the chat template shows with the prompt: JSON text of a list, None where there are none."""
    weight: float | None = None
    """How many pairs it counts as in the loss, above 0; None: one."""
    margin: float | None = None
    """By how much the reward of chosen is known to lie above that of rejected, in its units; None: unknown."""
    preference: float | None = None
    """The probability that chosen is the better answer, from .5, a tie, to 1; None: certain."""

    @property
    def pair_id(self) -> str:
        """Content id of the pair: 16 hex digits. A tie of two answers is another pair than a verdict on them."""
        tools = [] if self.tools is None else [self.tools]
        tie = ["tie"] if self.preference == TIE else []
        return _digest([plain(self.prompt), plain(self.chosen), plain(self.rejected), *tools, *tie])

    @property
    def prompt_id(self) -> str:
        """Content id of the prompt with its tools: 16 hex digits."""
        return prompt_id(list(self.prompt), self.tools)

    @property
    def couple_id(self) -> str:
        """Content id of the prompt and its answers, whichever is the better one: 16 hex digits."""
        sides = [plain(side) for side in (self.chosen, self.rejected) if side is not None]
        return _digest(
            [self.prompt_id, *sorted(sides, key=lambda side: side if isinstance(side, str) else _json(side))]
        )


@dataclass(frozen=True)
class TokenizedPair:
    """A pair as token ids, with the reference log-probs of its completion tokens where they are known.

    A side that an unpaired row lacks is an empty list of ids (a completion that is there holds one token at least that
    bears the loss), and so are its reference log-probs. Those are of the tokens that bear the loss alone, in order.
    """

    pair_id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_ref_logprobs: list[float] | None = None
    rejected_ref_logprobs: list[float] | None = None
    mismatched_ids: list[int] | None = None
    """The completion of a row with another prompt; see pairing.mismatched_rows."""
    mismatched_ref_logprobs: list[float] | None = None
    """Reference log-probs of mismatched_ids after this pair's own prompt."""
    chosen_mask: list[bool] | None = None
    """Which of chosen_ids bear the loss; None: all of them."""
    rejected_mask: list[bool] | None = None
    """Which of rejected_ids bear the loss; None: all of them."""
    mismatched_mask: list[bool] | None = None
    """Which of mismatched_ids bear the loss; None: all of them."""
    source: str | None = None
    """The source of a mixture that it is of; None: there is no mixture."""
    weight: float | None = None
    """As PreferencePair has it; so are the next two."""
    margin: float | None = None
    preference: float | None = None

    @property
    def chosen_loss_ids(self) -> list[int]:
        """The tokens of the chosen completion that bear the loss."""
        return bearing_loss(self.chosen_ids, self.chosen_mask)

    @property
    def rejected_loss_ids(self) -> list[int]:
        """The tokens of the rejected completion that bear the loss."""
        return bearing_loss(self.rejected_ids, self.rejected_mask)

    @property
    def num_tokens(self) -> int:
        """Tokens of the pair when its prompt is computed once."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("more", pa.string())]))
_MASK = pa.list_(pa.bool_())
_IDS = pa.list_(pa.int32())
_LOGPROBS = pa.list_(pa.float32())

TIE = 0.5
"""The preference of two answers that are equally good."""
JUDGED = ("weight", "margin", "preference")
"""Columns of how a pair was judged, each null where that is not known; see PreferencePair."""
CARRIED = ("source", *JUDGED)
"""Columns that go with a pair from ingest to training. `source`: the one of data.train that it is of, by name."""
_CARRIED = [("source", pa.string()), *((name, pa.float64()) for name in JUDGED)]

PROMPTS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("split", pa.string()),
        ("prompt", _MESSAGES),
        ("tools", pa.string()),
        ("answer", pa.string()),
    ]
)
"""`answer`: what rules compare completions with, null where there is none."""

_COMPLETION = pa.struct(
    [
        ("text", pa.string()),
        ("finished", pa.bool_()),
        ("num_tokens", pa.int32()),
        ("token_ids", _IDS),
        ("finish_reason", pa.string()),
        ("logprob", pa.float64()),
        ("model", pa.string()),
        ("system_prompt", pa.string()),
    ]
)
"""`finished`: it ended of itself; `logprob`: its summed log-prob in nats under the model that sampled it, at
temperature 1; `model`: hash of that model; `system_prompt`: what it was asked with in place of the prompt's own, null
where with nothing else."""

CANDIDATES = pa.schema([*PROMPTS, ("completions", pa.list_(_COMPLETION))])

REWARDS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("scores", pa.list_(pa.float64())),
        ("parts", pa.list_(pa.map_(pa.string(), pa.float64()))),
    ]
)
"""What a source gives to the completions of a row of candidates, one entry for each."""

TASK_MEASURES = pa.schema(
    [
        ("asked", pa.string()),
        ("task", pa.string()),
        ("num_fewshot", pa.int64()),
        ("metric", pa.string()),
        ("higher_is_better", pa.bool_()),
        ("value", pa.float64()),
        ("stderr", pa.float64()),
        ("n", pa.int64()),
    ]
)
"""What a model measures on a benchmark task: a row for each metric of the task that was asked for, or of each of those
that it stands for. Null: where lm-evaluation-harness tells none."""

PAIRS = pa.schema(
    [
        ("pair_id", pa.string()),
        ("prompt_id", pa.string()),
        ("couple_id", pa.string()),
        ("split", pa.string()),
        ("prompt", _MESSAGES),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("tools", pa.string()),
        ("chosen_turns", _MESSAGES),
        ("rejected_turns", _MESSAGES),
        *_CARRIED,
    ]
)
"""An answer that is text stands in `chosen` or `rejected`, one of several turns in `chosen_turns` or `rejected_turns`.
Both are null where a row lacks the side."""

GENERATED_PAIRS = pa.schema([*PAIRS, ("lineage", pa.string())])
"""Pairs of candidates. `lineage`: JSON text, what made each side and what it was scored."""

LENGTHS = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
"""Columns that say how many ids a row has, whether they bear the loss or not, for those who need not read the ids
themselves."""

TOKENIZED = pa.schema(
    [
        ("pair_id", pa.string()),
        ("prompt_id", pa.string()),
        ("split", pa.string()),
        ("prompt_ids", _IDS),
        ("chosen_ids", _IDS),
        ("rejected_ids", _IDS),
        *((name, pa.int32()) for name in LENGTHS),
        ("chosen_mask", _MASK),
        ("rejected_mask", _MASK),
        *_CARRIED,
    ]
)
"""A mask is null where all tokens of the completion bear the loss, as they do where it is one turn of the assistant."""

SCORES = pa.schema(
    [
        ("pair_id", pa.string()),
        ("chosen_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),
        ("chosen_reward", pa.float64()),
        ("rejected_reward", pa.float64()),
        ("chosen_logps", pa.float64()),
        ("rejected_logps", pa.float64()),
        ("chosen_ref_logps", pa.float64()),
        ("rejected_ref_logps", pa.float64()),
        ("source", pa.string()),
    ]
)
"""What a policy gives to a held-out pair. The rewards are as the loss sees them, without its scale beta, in nats; null
where there is no such completion. Log-probs are summed over the tokens that bear the loss, in nats, and these are what
is counted; those of the reference are null for a loss without one."""

REFERENCE = pa.schema([*TOKENIZED, ("chosen_ref_logprobs", _LOGPROBS), ("rejected_ref_logprobs", _LOGPROBS)])
"""Log-probs of the tokens that bear the loss."""

MISMATCHED = pa.schema(
    [*REFERENCE, ("mismatched_ids", _IDS), ("mismatched_mask", _MASK), ("mismatched_ref_logprobs", _LOGPROBS)]
)

QUARANTINE = pa.schema([("source", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("raw", pa.string())])


def prompt_id(prompt: list[Message], tools: str | None = None) -> str:
    """Content id of a prompt, with its tools if it has any: 16 hex digits."""
    return _digest(plain(prompt) if tools is None else [plain(prompt), tools])


def pair_row(pair: PreferencePair, split: Split, source: str | None = None) -> dict[str, Any]:
    """A pair as a row of PAIRS."""
    return {
        "pair_id": pair.pair_id,
        "prompt_id": pair.prompt_id,
        "couple_id": pair.couple_id,
        "split": split,
        "prompt": list(pair.prompt),
        "chosen": pair.chosen if isinstance(pair.chosen, str) else None,
        "rejected": pair.rejected if isinstance(pair.rejected, str) else None,
        "tools": pair.tools,
        "chosen_turns": list(pair.chosen) if isinstance(pair.chosen, tuple) else None,
        "rejected_turns": list(pair.rejected) if isinstance(pair.rejected, tuple) else None,
        "source": source,
        **{name: getattr(pair, name) for name in JUDGED},
    }


def answer_of(row: Mapping[str, Any], side: Literal["chosen", "rejected"]) -> Answer | None:
    """The answer of a row of PAIRS; None where the row lacks this side."""
    text, turns = row[side], row.get(f"{side}_turns")
    return text if turns is None else tuple(turns)


def bearing_loss(values: list[Value], mask: Sequence[bool] | None) -> list[Value]:
    """Of what a completion's tokens have each, that of the tokens that bear the loss.

    Raises ValueError where the mask is of another length.
    """
    if mask is None:
        return values
    if len(mask) != len(values):
        raise ValueError(f"a mask of {len(mask)} is no mask of {len(values)} tokens")
    return list(compress(values, mask))


def split_of(identifier: str, held_out_fraction: float, seed: int) -> Split:
    """Which side a prompt is on: by its own hash, so that a prompt is never on both sides."""
    place = int(hashlib.sha256(f"{seed}:{identifier}".encode()).hexdigest()[:8], 16) / 2**32
    return "eval" if place < held_out_fraction else "train"


def tokenized_row(
    pair_id: str,
    prompt_id: str,
    split: Split,
    prompt_ids: list[int],
    chosen_ids: list[int],
    rejected_ids: list[int],
    chosen_mask: list[bool] | None = None,
    rejected_mask: list[bool] | None = None,
    carried: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A row of TOKENIZED. carried: the row of PAIRS, for the columns that go with it; None: they are null."""
    ids = (prompt_ids, chosen_ids, rejected_ids)
    return {
        "pair_id": pair_id,
        "prompt_id": prompt_id,
        "split": split,
        "prompt_ids": prompt_ids,
        "chosen_ids": chosen_ids,
        "rejected_ids": rejected_ids,
        **{name: len(side) for name, side in zip(LENGTHS, ids, strict=True)},
        "chosen_mask": chosen_mask,
        "rejected_mask": rejected_mask,
        **{name: (carried or {}).get(name) for name in CARRIED},
    }


def tokenized_pair(row: dict[str, Any]) -> TokenizedPair:
    """A row of a tokenized, reference or mismatched shard."""
    return TokenizedPair(
        pair_id=row["pair_id"],
        prompt_ids=row["prompt_ids"],
        chosen_ids=row["chosen_ids"],
        rejected_ids=row["rejected_ids"],
        chosen_ref_logprobs=row.get("chosen_ref_logprobs"),
        rejected_ref_logprobs=row.get("rejected_ref_logprobs"),
        mismatched_ids=row.get("mismatched_ids"),
        mismatched_ref_logprobs=row.get("mismatched_ref_logprobs"),
        chosen_mask=row.get("chosen_mask"),
        rejected_mask=row.get("rejected_mask"),
        mismatched_mask=row.get("mismatched_mask"),
        **{name: row.get(name) for name in CARRIED},
    )


def steers(prompt_id: str, eval_fraction: float) -> bool:
    """Whether a held-out prompt is one that training is steered by, and trials ranked; the others judge the result.

    By a hash of its own, so that the two parts are alike whatever decided on the split.
    """
    return int(hashlib.sha256(f"steers:{prompt_id}".encode()).hexdigest()[:8], 16) < eval_fraction * 2**32


def drawn(pair_id: str, share: float) -> bool:
    """Whether a pair is among those that are drawn to be measured: at random, but always the same ones."""
    return int(hashlib.sha256(f"drawn:{pair_id}".encode()).hexdigest()[:8], 16) < share * 2**32


def plain(said: Sequence[Message] | Answer | None) -> Any:
    """Messages as lists of what they hold, whatever columns they were read from; text as it is."""
    if said is None or isinstance(said, str):
        return said
    return [{key: value for key, value in message.items() if value is not None} for message in said]


def _digest(value: Any) -> str:
    return hashlib.sha256(_json(value).encode()).hexdigest()[:16]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
