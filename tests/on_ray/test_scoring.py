"""Margins of held-out rows as the loss sees them, scored shards, and the choice of an engine; no Ray is started."""

from __future__ import annotations

import json
import math
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pydantic import TypeAdapter
from ray.exceptions import RayError, RayTaskError

from dpo_ray.config import VLLM, Config, Model
from dpo_ray.config.losses import Loss
from dpo_ray.errors import ConfigError, DataError, EngineDied
from dpo_ray.evaluation.held_out import held_out_margins
from dpo_ray.on_ray import calibrate, vllm_engine
from dpo_ray.on_ray.calibrate import choose_engine
from dpo_ray.on_ray.pool import ShardWorker
from dpo_ray.on_ray.vllm_engine import VLLMScorer
from dpo_ray.pairs import MISMATCHED, QUARANTINE, REFERENCE, SCORES, TOKENIZED, TokenizedPair
from dpo_ray.shards.isolation import Attempts
from dpo_ray.shards.output import Shard, ShardOutput
from dpo_ray.shards.score import MismatchShard, ScoreShard
from dpo_ray.storage.artifact import Artifact, publish, read_shard, write_shard
from dpo_ray.storage.location import Location
from pipelines.reference import require_enough_scored

Sides = tuple[list[float], list[float]]


def loss(**options: Any) -> Loss:
    return TypeAdapter(Loss).validate_python(options)


def artifact(folder: Path, kind: str, shards: list[pa.Table]) -> Artifact:
    location = Location.of(folder) / kind
    files = [write_shard(location / f"{i}.parquet", table, {}) for i, table in enumerate(shards)]
    return publish(location, kind, identity={}, inputs={}, files=files)


def scores(folder: Path, rows: dict[str, Sides]) -> Artifact:
    """One shard of a policy's token log-probs by pair_id."""
    values = [{"pair_id": i, "chosen_logprobs": c, "rejected_logprobs": r} for i, (c, r) in rows.items()]
    return artifact(folder, "policy_scores", [pa.Table.from_pylist(values, schema=SCORES)])


def reference(folder: Path, rows: dict[str, Sides], split: str = "eval") -> Artifact:
    """A shard a row of reference token log-probs by pair_id, and a last shard with a row of the training side."""
    shards = [
        {
            "pair_id": pair_id,
            "prompt_id": f"prompt of {pair_id}",
            "split": split,
            "prompt_ids": [1],
            "chosen_ids": [2] * len(chosen),
            "rejected_ids": [3] * len(rejected),
            "chosen_ref_logprobs": chosen,
            "rejected_ref_logprobs": rejected,
        }
        for pair_id, (chosen, rejected) in rows.items()
    ]
    shards.append({**shards[0], "pair_id": "training", "prompt_id": "t", "split": "train"})
    return artifact(folder, "reference", [pa.Table.from_pylist([row], schema=REFERENCE) for row in shards])


POLICY: dict[str, Sides] = {"a": ([-1.0, -2.0], [-4.0]), "b": ([-1.0], [-0.5, -0.5, -2.0])}
BASE: dict[str, Sides] = {"a": ([-2.0, -2.0], [-3.0]), "b": ([-0.5], [-1.0, -1.0, -1.0])}


def test_margins_of_dpo_are_differences_of_summed_log_ratios(tmp_path: Path):
    margins = held_out_margins(loss(type="sigmoid", beta=0.7), scores(tmp_path, POLICY), reference(tmp_path, BASE))
    # a: (−3 + 4) − (−4 + 3) = 2; b: (−1 + .5) − (−3 + 3) = −.5. Beta has no part in it.
    assert margins.tolist() == [2.0, -0.5]


def test_margins_of_other_losses_are_those_that_the_loss_sees(tmp_path: Path):
    made, base = scores(tmp_path, POLICY), reference(tmp_path, BASE)
    # By token: a: 1/2 − (−1/1); b: −.5/1 − 0/3.
    assert held_out_margins(loss(type="sigmoid_norm"), made, base).tolist() == pytest.approx([1.5, -0.5])
    # Means of the policy alone: a: −1.5 + 4; b: −1 + 1.
    assert held_out_margins(loss(type="simpo"), made, base).tolist() == pytest.approx([2.5, 0.0])
    # Tokens behind the shared length weigh nothing: a: (−1 + 2) + 1; b: −.5 − (−.5 + 1).
    options = loss(type="sigmoid", ld_alpha=0.0)
    assert held_out_margins(options, made, base).tolist() == pytest.approx([2.0, -1.0])


def test_a_loss_without_a_reference_needs_no_reference_columns(tmp_path: Path):
    rows = [
        {"pair_id": i, "prompt_id": i, "split": "eval", "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
        for i in POLICY
    ]
    tokenized = artifact(tmp_path, "tokenized", [pa.Table.from_pylist(rows, schema=TOKENIZED)])
    assert held_out_margins(loss(type="simpo"), scores(tmp_path, POLICY), tokenized).tolist() == [2.5, 0.0]


def test_unpaired_rows_are_compared_in_couples_by_the_order_of_their_ids(tmp_path: Path):
    # Log-ratios: desirable d1 = 1, d2 = 3, d3 = 9; undesirable u1 = −2, u2 = 5. The shards have another order.
    policy: dict[str, Sides] = {
        "u2": ([], [-1.0]), "d3": ([-1.0], []), "d1": ([-1.0], []), "u1": ([], [-3.0]), "d2": ([-1.0, -1.0], []),
    }  # fmt: skip
    base: dict[str, Sides] = {
        "d3": ([-10.0], []), "u1": ([], [-1.0]), "d2": ([-2.0, -3.0], []), "d1": ([-2.0], []), "u2": ([], [-6.0]),
    }  # fmt: skip
    margins = held_out_margins(loss(type="kto"), scores(tmp_path, policy), reference(tmp_path, base))
    # d1 with u1: 1 − (−2); d2 with u2: 3 − 5; d3 has no counterpart.
    assert margins.tolist() == [3.0, -2.0]


def test_where_some_rows_are_pairs_only_these_count(tmp_path: Path):
    policy = {**POLICY, "d": ([-1.0], []), "u": ([], [-1.0])}
    base = {**BASE, "d": ([-2.0], []), "u": ([], [-2.0])}
    assert held_out_margins(loss(type="kto"), scores(tmp_path, policy), reference(tmp_path, base)).tolist() == [2, -0.5]


def test_single_answers_of_one_kind_alone_have_no_margin(tmp_path: Path):
    one_kind: dict[str, Sides] = {"d": ([-1.0], []), "e": ([-1.0], [])}
    assert len(held_out_margins(loss(type="kto"), scores(tmp_path, one_kind), reference(tmp_path, one_kind))) == 0


def test_nothing_held_out_has_no_margin(tmp_path: Path):
    assert len(held_out_margins(loss(type="sigmoid"), scores(tmp_path, {}), reference(tmp_path, BASE, "train"))) == 0


def test_a_held_out_row_without_scores_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(DataError, match=r"1 held-out pairs .* have no scores in .*: b\. Remove"):
        held_out_margins(loss(type="sigmoid"), scores(tmp_path, {"a": POLICY["a"]}), reference(tmp_path, BASE))


def test_margins_that_are_not_finite_are_an_error_that_names_the_rows(tmp_path: Path):
    damaged = {**POLICY, "b": ([float("nan")], POLICY["b"][1])}
    with pytest.raises(DataError, match=r"1 held-out pairs have margins that are not finite, the first: b\."):
        held_out_margins(loss(type="sigmoid"), scores(tmp_path, damaged), reference(tmp_path, BASE))


class ByToken:
    """Scores that show what was asked for: a token's is minus its id, less a hundredth of the prompt's first id."""

    def score(self, pairs: Sequence[TokenizedPair]) -> tuple[list[list[float]], list[list[float]]]:
        def of(pair: TokenizedPair, ids: list[int]) -> list[float]:
            return [-float(i) - pair.prompt_ids[0] / 128 for i in ids]

        return [of(p, p.chosen_ids) for p in pairs], [of(p, p.rejected_ids) for p in pairs]


def shard(folder: Path, rows: list[tuple[str, str, int, list[int], list[int]]]) -> Shard:
    """A tokenized shard of (prompt_id, split, prompt token, chosen, rejected), scored by ByToken."""
    values = [
        {"pair_id": str(n), "prompt_id": p, "split": s, "prompt_ids": [i], "chosen_ids": c, "rejected_ids": r}
        for n, (p, s, i, c, r) in enumerate(rows)
    ]
    place = Location.of(folder) / "rows.parquet"
    write_shard(place, pa.Table.from_pylist(values, schema=TOKENIZED), {})
    scored = ScoreShard(ByToken(), ("chosen_ref_logprobs", "rejected_ref_logprobs"))(Shard(place.uri))
    write_shard(place, scored.table, {})
    return Shard(place.uri)


class Broken(ByToken):
    """Raises where one of the pairs has a certain token in its prompt."""

    def __init__(self, token: int):
        self.token = token

    def score(self, pairs: Sequence[TokenizedPair]) -> tuple[list[list[float]], list[list[float]]]:
        if any(self.token in pair.prompt_ids for pair in pairs):
            raise RuntimeError(f"no token {self.token} here")
        return super().score(pairs)


FOUR = [(p, "train", i, [10 * i], [10 * i + 1]) for i, p in enumerate("abcd")]


def quarantined(output: ShardOutput) -> list[tuple[int, str, dict[str, str]]]:
    assert output.quarantine is not None and output.quarantine.schema.equals(QUARANTINE)
    return [(row["row"], row["reason"], json.loads(row["raw"])) for row in output.quarantine.to_pylist()]


def attempts_in(folder: Path) -> Attempts:
    return Attempts(Location.of(folder) / "attempts" / "rows.json")


def test_a_row_that_cannot_be_scored_is_quarantined_and_the_others_are_not(tmp_path: Path):
    columns = ("chosen_ref_logprobs", "rejected_ref_logprobs")
    source = Shard(str(tmp_path / "tokenized.parquet"))
    rows = [
        {"pair_id": str(n), "prompt_id": p, "split": s, "prompt_ids": [i], "chosen_ids": c, "rejected_ids": r}
        for n, (p, s, i, c, r) in enumerate(FOUR)
    ]
    write_shard(Location(source.file), pa.Table.from_pylist(rows, schema=TOKENIZED), {})
    output = ScoreShard(Broken(2), columns)(source, attempts_in(tmp_path))
    assert output.table.schema.equals(REFERENCE)
    assert output.table["pair_id"].to_pylist() == ["0", "1", "3"]
    assert output.table["chosen_ref_logprobs"].to_pylist() == [[0.0], [-10 - 1 / 128], [-30 - 3 / 128]]
    assert output.counters == {"read": 4, "engine_error": 1}
    message = {"pair_id": "2", "message": "RuntimeError: no token 2 here"}
    assert quarantined(output) == [(2, "engine_error", message)]
    with pytest.raises(RuntimeError, match="no token 2"):
        ScoreShard(Broken(2), columns)(source)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_row_with_a_log_prob_that_is_not_finite_is_quarantined(tmp_path: Path, value: float):
    class Overflows(ByToken):
        def score(self, pairs: Sequence[TokenizedPair]) -> tuple[list[list[float]], list[list[float]]]:
            chosen, rejected = super().score(pairs)
            return chosen, [[value] if 2 in pair.prompt_ids else r for pair, r in zip(pairs, rejected, strict=True)]

    source = shard(tmp_path, FOUR)
    rows = read_shard(Location(source.file)).select(TOKENIZED.names)
    write_shard(Location(source.file), rows, {})
    columns = ("chosen_ref_logprobs", "rejected_ref_logprobs")
    output = ScoreShard(Overflows(), columns)(source, attempts_in(tmp_path))
    assert output.table["pair_id"].to_pylist() == ["0", "1", "3"]
    [(place, reason, raw)] = quarantined(output)
    assert (place, reason) == (2, "engine_error") and "not finite" in raw["message"]


def test_a_row_whose_mismatched_completion_cannot_be_scored_is_quarantined(tmp_path: Path):
    source = shard(tmp_path, [("z", "eval", 9, [90], [91]), *FOUR])  # the first row has no mismatched completion
    output = MismatchShard(Broken(2))(source, attempts_in(tmp_path))
    assert output.table.schema.equals(MISMATCHED)
    assert output.table["pair_id"].to_pylist() == ["0", "1", "2", "4"]
    assert [n for n, scored in enumerate(output.table["mismatched_ref_logprobs"].to_pylist()) if scored is None] == [0]
    assert output.table["mismatched_ref_logprobs"].to_pylist()[1:] == [[-11.0], [-20 - 1 / 128], [-3 / 128]]
    assert [(place, reason) for place, reason, _ in quarantined(output)] == [(3, "engine_error")]


def test_a_worker_writes_the_quarantine_and_forgets_the_attempts(tmp_path: Path):
    source = shard(tmp_path / "in", FOUR)
    output = Location.of(tmp_path / "out")
    worker = ShardWorker(output, MismatchShard, {"scorer": Broken(1)}, isolates=True)
    batch = pa.table({"task": [pickle.dumps(("x.parquet", source))]})
    assert worker(batch)["name"].to_pylist() == ["x.parquet"]
    assert read_shard(output / "x.parquet").num_rows == 3
    assert read_shard(output / "quarantine" / "x.parquet").num_rows == 1
    assert (output / "attempts").children() == []


def test_the_share_of_rows_that_could_not_be_scored_is_limited(tmp_path: Path):
    location = Location.of(tmp_path)
    counters = {"read": 40, "kept": 37, "engine_error": 1, "engine_crash": 2}
    scored = publish(location, "reference", identity={}, inputs={}, files=[], counters=counters)
    require_enough_scored(scored, 0.075)
    with pytest.raises(
        DataError, match=r"3 of 40 rows \(engine_error 1, engine_crash 2\), a share of 7\.5%, more than"
    ):
        require_enough_scored(scored, 0.07)


def test_mismatched_completions_are_of_other_prompts_of_either_kind_and_scored_after_this_one(tmp_path: Path):
    source = shard(
        tmp_path,
        [
            ("a", "train", 1, [10, 11], [12]),
            ("b", "train", 2, [20], [21, 22]),
            ("b", "eval", 2, [20], [23]),
            ("c", "train", 3, [30], [31]),
        ],
    )
    output = MismatchShard(ByToken())(source)
    assert output.table.schema.equals(MISMATCHED)
    # Even places take the chosen side of the next other prompt, odd ones the rejected side; "eval" has one prompt.
    assert output.table["mismatched_ids"].to_pylist() == [[20], [31], None, [12]]
    assert output.table["mismatched_ref_logprobs"].to_pylist() == [
        [-20 - 1 / 128],
        [-31 - 2 / 128],
        None,
        [-12 - 3 / 128],
    ]
    assert output.table.num_rows == output.counters["read"] == 4


def test_a_row_takes_the_side_that_a_single_answer_has(tmp_path: Path):
    rows = [("a", "train", 1, [10], []), ("b", "train", 2, [], [21]), ("c", "train", 3, [30], [])]
    table = MismatchShard(ByToken())(shard(tmp_path, rows)).table
    assert table["rejected_ref_logprobs"].to_pylist() == [[], [-21 - 2 / 128], []]
    assert table["mismatched_ids"].to_pylist() == [[21], [30], [10]]


def test_pairs_go_to_vllm_in_groups_bounded_by_what_both_sides_have_with_their_prompt(monkeypatch):
    monkeypatch.setattr(vllm_engine, "_VLLM_GROUP_TOKENS", 10)
    pairs = [TokenizedPair(str(n), [0] * n, [0], [0]) for n in (1, 2, 9, 1)]  # 4, 6, 20, 4 tokens
    sizes: list[int] = []

    class Groups(vllm_engine.VLLMScorer):
        def __init__(self) -> None:
            self.llm = SimpleNamespace(reset_prefix_cache=lambda: None)

        def _score(self, sequences):
            sizes.append(len(sequences))
            return [[float(len(prompt))] for prompt, _ in sequences]

    chosen, rejected = Groups().score(pairs)
    assert chosen == rejected == [[1.0], [2.0], [9.0], [1.0]]
    assert sizes == [2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(("vocab_size", "tokens"), [(151_936, 785), (49_152, 2427), (512, 4096), (2_000_000, 128)])
def test_logits_of_scored_prompts_stay_below_a_gibibyte(vocab_size: int, tokens: int):
    assert vllm_engine.tokens_at_once(vocab_size) == tokens
    assert tokens == 128 or tokens * vocab_size * 9 <= 2**30


def engine_arguments(monkeypatch: pytest.MonkeyPatch, scores: bool, **options: Any) -> dict[str, Any]:
    """What vLLM would be built with, for a vocabulary of 151 936."""
    text = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=151_936))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=lambda **arguments: arguments))
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: text)
    monkeypatch.setattr(vllm_engine, "resolve", lambda *_: Path("m"))
    return vllm_engine._engine("m", None, "float32", False, VLLM(**options), 8192, scores)


def test_a_scoring_engine_on_cpu_computes_only_tokens_whose_logits_have_room(monkeypatch: pytest.MonkeyPatch):
    built = engine_arguments(monkeypatch, True, max_num_seqs=1000)
    assert (built["max_num_batched_tokens"], built["max_num_seqs"], built["max_model_len"]) == (785, 785, 8193)
    assert built["enable_chunked_prefill"]
    assert engine_arguments(monkeypatch, True, max_num_batched_tokens=64)["max_num_batched_tokens"] == 64
    for scores, gpus in ((False, 0), (True, 1)):  # no logits of prompts, or those of few tokens at a time
        assert "max_num_batched_tokens" not in engine_arguments(monkeypatch, scores, gpus_per_actor=gpus)


class FakeVLLM:
    """Gives each token the log-prob −id; for prompts in `cached` none to be trusted, unless it may not read them."""

    def __init__(self, by_token_ids: bool, cached: tuple[int, ...] = ()):
        self.cached = cached
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(use_v2_model_runner=by_token_ids))
        self.asked: list[tuple[list[int], bool]] = []

    def reset_prefix_cache(self) -> bool:
        return True

    def generate(self, inputs: list[dict[str, list[int]]], sampling: list[dict[str, Any]], **_: Any) -> list[Any]:
        return [self._output(i["prompt_token_ids"], params) for i, params in zip(inputs, sampling, strict=True)]

    def _output(self, ids: list[int], params: dict[str, Any]) -> Any:
        skips = params["skip_reading_prefix_cache"]
        self.asked.append((ids, skips))
        found = len(ids) - 1 if ids[0] in self.cached and not skips else 0
        logprobs = [math.nan if n < found else -float(t) for n, t in enumerate(ids)]
        wanted = params.get("prompt_logprob_token_ids")
        by_token_ids = None if wanted is None or found else -wanted.astype(float)
        return SimpleNamespace(
            num_cached_tokens=found,
            prompt_logprobs=SimpleNamespace(start_indices=list(range(len(ids))), token_ids=ids, logprobs=logprobs),
            prompt_token_id_logprobs=by_token_ids,
        )


def vllm_scorer(monkeypatch: pytest.MonkeyPatch, llm: FakeVLLM) -> VLLMScorer:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **options: options))
    monkeypatch.setattr(vllm_engine, "_engine", lambda *_: llm)
    return VLLMScorer(Model(path="m"), VLLM(), 16)


@pytest.mark.parametrize("by_token_ids", [False, True])
def test_vllm_is_not_asked_about_absent_sides(monkeypatch: pytest.MonkeyPatch, by_token_ids: bool):
    llm = FakeVLLM(by_token_ids)
    scorer = vllm_scorer(monkeypatch, llm)
    pairs = [TokenizedPair("d", [1], [2, 3], []), TokenizedPair("u", [4], [], [5]), TokenizedPair("p", [6], [7], [8])]
    assert scorer.score(pairs) == ([[-2.0, -3.0], [], [-7.0]], [[], [-5.0], [-8.0]])
    assert llm.asked == [([1, 2, 3], False), ([6, 7], False), ([4, 5], False), ([6, 8], False)]
    assert scorer.score(pairs[:1])[1] == [[]]


@pytest.mark.parametrize("by_token_ids", [False, True])
def test_what_the_cache_has_of_a_completion_is_scored_again_without_it(
    monkeypatch: pytest.MonkeyPatch, by_token_ids: bool
):
    llm = FakeVLLM(by_token_ids, cached=(4,))
    pairs = [TokenizedPair("a", [1], [2, 3], [9]), TokenizedPair("b", [4], [5, 6], [7, 8])]
    assert vllm_scorer(monkeypatch, llm).score(pairs) == ([[-2.0, -3.0], [-5.0, -6.0]], [[-9.0], [-7.0, -8.0]])
    assert [ids for ids, skips in llm.asked if skips] == [[4, 5, 6], [4, 7, 8]]


@pytest.mark.parametrize(("unfinished", "expected"), [(False, ValueError), (True, EngineDied)])
def test_vllm_that_breaks_off_in_a_step_is_not_used_again(monkeypatch: pytest.MonkeyPatch, unfinished: bool, expected):
    def refuse(*_: Any, **__: Any) -> list[Any]:
        raise ValueError("too long")

    llm = FakeVLLM(False)
    llm.llm_engine.has_unfinished_requests = lambda: unfinished
    monkeypatch.setattr(llm, "generate", refuse)
    with pytest.raises(expected):
        vllm_scorer(monkeypatch, llm).score([TokenizedPair("p", [6], [7], [8])])


Settings = Callable[..., Config]


@pytest.fixture
def auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A configuration with engine auto, of a model folder without a model in it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(calibrate, "has_vllm", lambda: True)
    monkeypatch.setattr(calibrate, "require_vllm", lambda _: "0.32.0")

    def config(**options: Any) -> Config:
        return Config.model_validate(
            {
                "run": {"name": "n", "output": str(tmp_path / "out")},
                "model": {"path": str(tmp_path / "model")},
                "data": {"train": "x"},
                "reference": {"engine": "auto", "calibration_pairs": 2, **options},
            }
        )

    return config


def tokenized_rows(folder: Path) -> Artifact:
    rows = [
        {"pair_id": str(n), "prompt_id": p, "split": s, "prompt_ids": [i], "chosen_ids": c, "rejected_ids": r}
        for n, (p, s, i, c, r) in enumerate(FOUR)
    ]
    location = Location.of(folder) / "tokenized"
    files = [write_shard(location / "0.parquet", pa.Table.from_pylist(rows, schema=TOKENIZED), {})]
    return publish(location, "tokenized", identity={"tokenizer": "t"}, inputs={}, files=files)


def engines_that_say(monkeypatch: pytest.MonkeyPatch, vllm: Any, torch: Sequence[float]) -> list[str]:
    """Both engines answer with these log-probs of chosen and rejected, or fail; returns who was asked."""
    asked: list[str] = []

    def scored(pool: Any) -> Any:
        asked.append(pool.build.__name__)
        if pool.build.__name__ == "_score_by_trainer":
            return [[torch[0]]] * 2, [[torch[1]]] * 2
        if isinstance(vllm, Exception):
            raise vllm
        return [[vllm[0]]] * 2, [[vllm[1]]] * 2

    monkeypatch.setattr(calibrate, "_scored", scored)
    return asked


def test_the_calibrated_pairs_are_of_shards_from_the_first_to_the_last(tmp_path):
    location = Location.of(tmp_path) / "tokenized"
    files = []
    for n in range(40):
        rows = [{"pair_id": f"{n}", "prompt_id": "p", "split": "train", "prompt_ids": [1], "chosen_ids": [2]}]
        table = pa.Table.from_pylist(rows if n != 26 else [], schema=TOKENIZED)
        files.append(write_shard(location / f"{n}.parquet", table, {}))
    rows = publish(location, "tokenized", identity={}, inputs={}, files=files)
    assert [pair.pair_id for pair in calibrate._sample(rows, 4)] == ["0", "12", "25", "39"]
    assert len(calibrate._sample(rows, 39)) == len(calibrate._sample(rows, 100)) == 39
    assert [pair.pair_id for pair in calibrate._sample(rows, 1)] == ["0"]


def test_auto_takes_vllm_where_it_agrees_and_keeps_to_it(tmp_path, auto: Settings, monkeypatch, capfd):
    asked = engines_that_say(monkeypatch, (-1.0, -2.0), (-1.0, -2.04))
    rows, output = tokenized_rows(tmp_path), Location.of(tmp_path / "out")
    assert choose_engine(output, auto(), rows) == "vllm"
    assert asked == ["_score_by_vllm", "_score_by_trainer"]
    said = "".join(capfd.readouterr())
    assert "vllm, for on 2 pairs" in said and "4.0e-02" in said
    # Later it is not measured again, whatever would be found now; with another tolerance it is.
    engines_that_say(monkeypatch, (-9.0, -9.0), (-1.0, -2.0))
    assert choose_engine(output, auto(), rows) == "vllm"
    assert choose_engine(output, auto(tolerance=0.01), rows) == "torch"
    assert choose_engine(output, auto(engine="vllm"), rows) == "vllm"


@pytest.mark.parametrize(
    ("vllm", "why"),
    [
        ((-1.0, -2.06), "differ by up to 6.0e-02"),
        ((-1.0, math.nan), "not finite"),
        (
            RayTaskError("score", "boom\nno such architecture", ValueError()),
            "cannot score this model: no such architecture",
        ),
    ],
)
def test_auto_takes_torch_where_vllm_does_not_agree_or_fails(tmp_path, auto: Settings, monkeypatch, capfd, vllm, why):
    engines_that_say(monkeypatch, vllm, (-1.0, -2.0))
    assert choose_engine(Location.of(tmp_path / "out"), auto(), tokenized_rows(tmp_path)) == "torch"
    said = "".join(capfd.readouterr())
    assert "reference.engine=auto: torch, for " in said and why in said


def test_auto_does_not_remember_what_a_lost_node_did(tmp_path, auto: Settings, monkeypatch, capfd):
    rows, output = tokenized_rows(tmp_path), Location.of(tmp_path / "out")
    engines_that_say(monkeypatch, RayError("the node died"), (-1.0, -2.0))
    assert choose_engine(output, auto(), rows) == "torch"
    assert "reference.engine=auto: torch for this run" in "".join(capfd.readouterr())
    engines_that_say(monkeypatch, (-1.0, -2.0), (-1.0, -2.0))
    assert choose_engine(output, auto(), rows) == "vllm"


def test_auto_takes_torch_where_vllm_is_not_installed(tmp_path, auto: Settings, monkeypatch):
    asked = engines_that_say(monkeypatch, (-1.0, -2.0), (-1.0, -2.0))
    monkeypatch.setattr(calibrate, "has_vllm", lambda: False)
    assert choose_engine(Location.of(tmp_path / "out"), auto(), tokenized_rows(tmp_path)) == "torch"
    assert asked == []


def test_auto_does_not_hide_errors_of_its_own(tmp_path, auto: Settings, monkeypatch):
    engines_that_say(monkeypatch, ConfigError("the cluster is too small"), (-1.0, -2.0))
    with pytest.raises(ConfigError, match="too small"):
        choose_engine(Location.of(tmp_path / "out"), auto(), tokenized_rows(tmp_path))
