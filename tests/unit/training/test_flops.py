"""The counting of operations, against numbers worked by hand."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from dpo_ray.config import LoRA, Train
from dpo_ray.training.flops import (
    ModelShape,
    attention_flops,
    flops,
    pair_flops,
    passes,
    scored_pairs,
    total_flops,
)

TWO_MATRICES = ModelShape(backbone=((3, 2), (2, 3)), head=(10, 2), num_layers=1, attention_width=4)


def test_a_query_sees_itself_and_what_is_before_it_on_its_own_branch():
    # Prompt 2, chosen 1: 1 + 2 + 3. Rejected 2: the first sees 2 + 1, the second 2 + 2.
    assert scored_pairs((2, 1, 2)) == 6 + 7


def test_without_a_prompt_the_two_completions_are_two_triangles():
    assert scored_pairs((0, 3, 2)) == 6 + 3


def test_sharing_the_prompt_leaves_out_its_own_triangle_once():
    prompt, chosen, rejected = 50, 7, 9

    def triangle(n: int) -> int:
        return n * (n + 1) // 2

    apart = triangle(prompt + chosen) + triangle(prompt + rejected)
    assert scored_pairs((prompt, chosen, rejected)) == apart - triangle(prompt)


def test_the_flops_of_a_pair_worked_by_hand():
    # Backbone: 6 · 12 weights · 5 tokens; head: 6 · 10 · 2 · 3 tokens; attention: 12 · 4 · 13 query-key pairs.
    assert attention_flops(TWO_MATRICES, (2, 1, 2)) == 624
    assert pair_flops(TWO_MATRICES, (2, 1, 2)) == 360 + 360 + 624


def test_the_flops_of_pairs_add_up():
    pairs = [(2, 1, 2), (5, 3, 1)]
    assert flops(TWO_MATRICES, pairs) == sum(pair_flops(TWO_MATRICES, p) for p in pairs)


def test_a_shape_is_read_from_a_configuration():
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    shape = ModelShape.of(config)
    layer = 8 * 8 + 2 * (4 * 8) + 8 * 8 + 3 * (8 * 12)  # q; k and v; o; gate, up and down
    assert sum(rows * columns for rows, columns in shape.backbone) == 3 * layer
    assert (shape.head, shape.num_layers, shape.attention_width) == ((100, 8), 3, 8)


def test_a_shape_goes_through_json():
    assert ModelShape.from_json(json.loads(json.dumps(asdict(TWO_MATRICES)))) == TWO_MATRICES


def test_many_pairs_at_once_are_the_sum():
    lengths = np.array([(2, 1, 2), (5, 3, 1), (0, 4, 4)])
    assert total_flops(TWO_MATRICES, lengths) == flops(TWO_MATRICES, [tuple(map(int, row)) for row in lengths])


def test_of_experts_those_count_that_a_token_goes_through():
    from transformers import Qwen3MoeConfig

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 100, "moe_intermediate_size": 6, "head_dim": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    shape = ModelShape.of(Qwen3MoeConfig(**sizes, **heads, num_experts=8, num_experts_per_tok=2))
    attention, router, expert = 4 * 8 * 8, 8 * 8, 3 * 8 * 6
    found = sum(rows * columns for rows, columns in shape.backbone)
    assert found in (attention + 2 * expert, attention + router + 2 * expert)  # whether the router is a layer


def test_what_a_step_computes_beside_forward_and_backward():
    assert passes(Train(), None) == 1
    assert passes(Train(), LoRA()) == pytest.approx(2 / 3)
    assert passes(Train(activation_checkpointing=True), None) == pytest.approx(4 / 3)
    assert passes(Train(loss={"type": "aot"}), None) == pytest.approx(4 / 3)
    assert passes(Train(loss={"type": "kto"}), None) == pytest.approx(4 / 3)
