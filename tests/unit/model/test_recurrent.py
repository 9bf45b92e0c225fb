"""Layers with state between tokens, on the packed row: each sequence by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.attention import FAMILIES, micro_batch, saved
from dpo_ray.model.attention import Segments
from dpo_ray.model.packing import pack
from dpo_ray.model.policy import CompletionScorer, load_policy
from dpo_ray.model.recurrent import Separation, by_sequence, separated, sequence_rows
from dpo_ray.model.segment import Segment
from tests.gradients import require_same
from tests.rounding import require_gradients
from tests.training import Trained, random_pairs, run, scored

CPU = torch.device("cpu")
# Of both sides; of chosen alone; of rejected alone; a shared part that rejected goes on from, with no token of chosen.
PAIRS = (Segment(0, 2, 1, 2), Segment(5, 1, 2, 0), Segment(8, 2, 0, 1))


def test_rows_by_hand():
    (of_three_or_less,) = (rows for rows in sequence_rows(PAIRS, CPU) if rows.take.shape[1] == 3)
    assert of_three_or_less.take.tolist() == [[0, 1, 2], [5, 6, 7], [8, 9, 10]]
    assert of_three_or_less.put.tolist() == [0, 1, 2, 5, 6, 7, 8, 9, 10]
    assert of_three_or_less.place.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    (of_four,) = (rows for rows in sequence_rows(PAIRS, CPU) if rows.take.shape[1] == 4)
    assert of_four.take.tolist() == [[0, 1, 3, 4]]
    # What is shared is filled by the sequence of chosen.
    assert of_four.put.tolist() == [3, 4] and of_four.place.tolist() == [2, 3]


@pytest.mark.parametrize("pairs", [micro_batch(seed) for seed in range(3)])
def test_each_position_is_filled_once_and_padding_is_less_than_half(pairs: Any):
    batch = pack(pairs)
    assert batch.segments is not None
    rows = sequence_rows(batch.segments, CPU)
    assert sorted(torch.cat([r.put for r in rows]).tolist()) == list(range(batch.input_ids.shape[1]))
    for r in rows:
        assert torch.equal(r.take.flatten()[r.place], r.put)
    # A sequence of its own length is in a group whose longest is less than twice as long.
    sequences = sum(len(p.prompt_ids) + len(a) for p in pairs for a in (p.chosen_ids, p.rejected_ids) if a)
    assert sum(r.take.numel() for r in rows) < 2 * sequences


def test_a_sum_over_what_came_before_by_hand():
    values = torch.arange(1.0, 12.0).view(1, -1, 1)
    out = by_sequence(lambda rows: rows.cumsum(1), values, Segments(PAIRS))
    assert out.flatten().tolist() == [1, 3, 6, 7, 12, 6, 13, 21, 9, 19, 30]


class Layer(nn.Module):
    """A decoder layer that does not hand its mixer what it is given."""

    class Mixer(nn.Module):
        def forward(self, hidden_states: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return scale * hidden_states.cumsum(1)

    def __init__(self) -> None:
        super().__init__()
        self.conv = self.Mixer()

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.conv(hidden_states=hidden, scale=2.0) + self.conv(hidden)


def test_a_mixer_goes_by_sequence_where_its_layer_is_given_segments_and_whole_otherwise():
    layer, values = Layer(), torch.ones(1, 11, 1)
    separation = Separation([layer])
    assert separated(layer) == {"conv"}
    apart = [1, 2, 3, 3, 4, 1, 2, 3, 1, 2, 3]
    assert layer(values, segments=Segments(PAIRS)).flatten().tolist() == [3.0 * x for x in apart]
    assert layer(values).flatten().tolist() == [3.0 * x for x in range(1, 12)]
    separation.end()
    assert separated(layer) == set()
    assert layer(values, segments=Segments(PAIRS)).flatten().tolist() == [3.0 * x for x in range(1, 12)]


@pytest.mark.parametrize("name", ["Qwen3.5, linear attention", "Falcon-H1, Mamba-2 beside attention"])
def test_activations_computed_again_are_those_of_their_own_micro_batch(name: str, tmp_path: Path):
    folder = saved(next(f for f in FAMILIES if f.name == name), tmp_path)
    batches = [pack(micro_batch()[:2]), pack(micro_batch()[2:])]
    found = []
    for checkpointing in (False, True):
        scorer = CompletionScorer(load_policy(folder, activation_checkpointing=checkpointing)).train()
        # Both forward passes before the first backward one.
        sum(scorer(batch).logprobs.sum() for batch in batches).backward()
        found.append([p.grad for p in scorer.parameters()])
    require_gradients(found[1], found[0], of_all=True)


def test_a_model_that_stays_padded_is_left_as_it_was(tmp_path: Path):
    policy = load_policy(saved(next(f for f in FAMILIES if f.name == "Nemotron-H, Mamba-2"), tmp_path))
    assert separated(policy) == set()
    assert policy.config._attn_implementation != "dpo_packed"


def test_a_training_comes_to_the_same_as_on_padded_pairs_and_says_how_it_was_computed(tmp_path: Path):
    folder = saved(next(f for f in FAMILIES if f.name == "Qwen3.5, linear attention"), tmp_path / "model")
    pairs = scored(random_pairs(16, vocabulary=64), folder)
    found = []
    for packed in (True, False):
        place = tmp_path / str(packed)
        state = run(
            folder, pairs, place, packed=packed, record_gradients=True, strategy="fsdp", activation_checkpointing=True
        )
        found.append((state.layout, json.loads((Trained(place).last / "state.json").read_text())["layout"]))
    assert found == [("shared, linear_attn apart",) * 2, ("padded",) * 2]
    require_same(*(Trained(tmp_path / str(packed)).gradients for packed in (True, False)))
