"""The two layouts of a micro-batch, and that they are the same computation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from dpo_ray.data.pairing import mismatched
from dpo_ray.errors import ConfigError, DataError
from dpo_ray.losses.pair_logps import sum_by_sequence
from dpo_ray.model.attention import IMPLEMENTATION
from dpo_ray.model.packing import pack, pad
from dpo_ray.model.policy import CompletionScorer, load_policy
from dpo_ray.model.segment import Segment
from dpo_ray.pairs import TokenizedPair
from tests.rounding import of_logprob, require_gradients

A = TokenizedPair("a", [5, 6, 7, 8, 9], [10, 11, 2], [12, 2])
B = TokenizedPair("b", [20], [21], [22, 23, 24, 2])  # a prompt and an answer of one token
C = TokenizedPair("c", [30, 31], [32, 33, 34, 35, 36, 2], [37])
PAIRS = [A, B, C]
DESIRABLE = replace(A, pair_id="d", rejected_ids=[])
UNDESIRABLE = replace(B, pair_id="u", chosen_ids=[])
UNPAIRED = [UNDESIRABLE, DESIRABLE]
ALIKE = [  # answers that begin alike, and one that the other goes on from
    TokenizedPair("e", [40, 41], [50, 51, 52, 2], [50, 51, 53]),
    TokenizedPair("f", [42], [50, 51, 52, 2], [50, 51]),
    TokenizedPair("g", [43, 44], [50, 51], [50, 51, 52, 2]),
]

# Answers in which not every token bears the loss: interrupted ones, also where both begin alike, and a single one.
MASKED = [
    replace(A, pair_id="h", chosen_mask=[True, False, True]),
    TokenizedPair(
        "i",
        [45, 46],
        [50, 51, 52, 53, 54, 2],
        [50, 51, 55, 2],
        chosen_mask=[False, True, False, False, True, True],
        rejected_mask=[True, False, False, True],
    ),
    replace(UNDESIRABLE, pair_id="j", rejected_mask=[False, False, True, True]),
]

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

NEAR = of_logprob(64)

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """saved_model("Llama", option=…): the folder of a small random model of that architecture."""

    def build(architecture: str, **options: Any) -> Path:
        config = getattr(transformers, f"{architecture}Config")(**{**SIZES, **options})
        folder = tmp_path_factory.mktemp(architecture)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                # Weights as large as trained ones: with the small initial ones attention hardly matters.
                if parameter.ndim >= 2:
                    torch.nn.init.normal_(parameter, std=0.15)
            model.save_pretrained(folder)
        return folder

    return build


def scorer(folder: Path) -> CompletionScorer:
    return CompletionScorer(load_policy(folder)).eval()


def unshared(folder: Path, pairs: list[TokenizedPair]) -> Tensor:
    """The same log-probs the plain way: transformers' own forward over each sequence alone, all logits held."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    values = []
    for pair in pairs:
        sides = (pair.chosen_ids, pair.chosen_mask), (pair.rejected_ids, pair.rejected_mask)
        for completion, mask in (side for side in sides if side[0]):
            logits = model(torch.tensor([pair.prompt_ids + completion])).logits[0]
            predicting = logits[len(pair.prompt_ids) - 1 : -1].log_softmax(-1)
            found = predicting.gather(-1, torch.tensor(completion)[:, None])[:, 0]
            values.append(found if mask is None else found[torch.tensor(mask)])
    return torch.cat(values)


def test_a_packed_row_by_hand():
    batch = pack([A, B])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 2, 12, 2, 20, 21, 22, 23, 24, 2]]
    # Both answers go on from the end of the prompt.
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 0, 1, 1, 2, 3, 4]]
    assert batch.segments == (Segment(0, 5, 3, 2), Segment(10, 1, 1, 4))
    assert batch.attention_mask is None
    assert batch.targets.tolist() == [10, 11, 2, 12, 2, 21, 22, 23, 24, 2]
    # The last prompt token predicts the first token of both answers.
    assert batch.predictors.tolist() == [4, 5, 6, 4, 8, 10, 10, 12, 13, 14]
    assert batch.sequence_index.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 3]


def test_what_both_answers_begin_with_stands_in_the_row_once():
    batch = pack(ALIKE)
    assert batch.input_ids.tolist() == [[40, 41, 50, 51, 52, 2, 53, 42, 50, 51, 52, 2, 43, 44, 50, 51, 52, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]]
    assert batch.segments == (Segment(0, 4, 2, 1), Segment(7, 3, 2, 0), Segment(12, 4, 0, 2))
    assert batch.targets.tolist() == [50, 51, 52, 2, 50, 51, 53, 50, 51, 52, 2, 50, 51, 50, 51, 50, 51, 52, 2]
    assert batch.predictors.tolist() == [1, 2, 3, 4, 1, 2, 3, 7, 8, 9, 10, 7, 8, 13, 14, 13, 14, 15, 16]


def test_padded_rows_by_hand():
    batch = pad([A, B])
    assert batch.input_ids.tolist() == [
        [5, 6, 7, 8, 9, 10, 11, 2],
        [5, 6, 7, 8, 9, 12, 2, 0],
        [20, 21, 0, 0, 0, 0, 0, 0],
        [20, 22, 23, 24, 2, 0, 0, 0],
    ]
    assert batch.attention_mask is not None
    assert batch.attention_mask.sum(dim=1).tolist() == [8, 7, 2, 5]
    assert batch.segments is None
    assert batch.predictors.tolist() == [4, 5, 6, 8 + 4, 8 + 5, 16, 24, 25, 26, 27]


def test_absent_sides_by_hand():
    packed = pack(UNPAIRED)
    assert packed.input_ids.tolist() == [[20, 22, 23, 24, 2, 5, 6, 7, 8, 9, 10, 11, 2]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7]]
    assert packed.segments == (Segment(0, 1, 0, 4), Segment(5, 5, 3, 0))
    assert packed.predictors.tolist() == [0, 1, 2, 3, 9, 10, 11]
    # The first pair has rejected tokens only, the second chosen ones only.
    assert packed.sequence_index.tolist() == [1, 1, 1, 1, 2, 2, 2]
    padded = pad(UNPAIRED)
    assert padded.input_ids.tolist() == [[20, 22, 23, 24, 2, 0, 0, 0], [5, 6, 7, 8, 9, 10, 11, 2]]
    assert padded.predictors.tolist() == [0, 1, 2, 3, 12, 13, 14]
    assert padded.sequence_index.tolist() == [1, 1, 1, 1, 2, 2, 2]


def test_only_tokens_that_bear_the_loss_are_targets_and_all_are_seen():
    packed, padded = pack(MASKED), pad(MASKED)
    for batch in (packed, padded):
        assert batch.targets.tolist() == [10, 2, 12, 2, 51, 54, 2, 50, 2, 24, 2]
        assert batch.sequence_index.tolist() == [0, 0, 1, 1, 2, 2, 2, 3, 3, 5, 5]
    [row] = packed.input_ids.tolist()
    assert row == [5, 6, 7, 8, 9, 10, 11, 2, 12, 2, 45, 46, 50, 51, 52, 53, 54, 2, 55, 2, 20, 22, 23, 24, 2]
    assert packed.predictors.tolist() == [4, 6, 4, 8, 12, 15, 16, 11, 18, 22, 23]
    assert padded.input_ids.shape == (5, 8)
    assert padded.predictors.tolist() == [4, 6, 12, 13, 18, 21, 22, 25, 28, 34, 35]


@pytest.mark.parametrize("layout", [pack, pad])
def test_reference_log_probs_are_those_of_the_tokens_that_bear_the_loss(layout: Callable[..., Any]):
    scored = replace(MASKED[0], chosen_ref_logprobs=[-1.0, -3.0], rejected_ref_logprobs=[-4.0, -5.0])
    assert layout([scored]).reference_logprobs.tolist() == [-1, -3, -4, -5]
    with pytest.raises(DataError, match="Pair h has 3 reference log-probs for a completion of 2 tokens that bear"):
        layout([replace(scored, chosen_ref_logprobs=[-1.0, -2.0, -3.0])])


def test_a_mask_that_is_not_of_its_completion_is_an_error():
    for layout in (pack, pad):
        with pytest.raises(ValueError, match="a mask of 1 is no mask of 3 tokens"):
            layout([replace(A, chosen_mask=[True])])


REFERENCE = [
    replace(A, chosen_ref_logprobs=[-1.0, -2.0, -3.0], rejected_ref_logprobs=[-4.0, -5.0]),
    replace(UNDESIRABLE, chosen_ref_logprobs=[], rejected_ref_logprobs=[-6.0, -7.0, -8.0, -9.0]),
    replace(DESIRABLE, chosen_ref_logprobs=[-0.5, -1.5, -2.5]),
]


@pytest.mark.parametrize("layout", [pack, pad])
def test_reference_log_probs_stand_beside_their_tokens(layout: Callable[..., Any]):
    batch = layout(REFERENCE)
    assert batch.targets.tolist() == [10, 11, 2, 12, 2, 22, 23, 24, 2, 10, 11, 2]
    assert batch.reference_logprobs.tolist() == [-1, -2, -3, -4, -5, -6, -7, -8, -9, -0.5, -1.5, -2.5]
    assert batch.reference_logprobs.dtype == torch.float32
    assert layout(PAIRS).reference_logprobs is None


@pytest.mark.parametrize("layout", [pack, pad])
@pytest.mark.parametrize(
    "pair",
    [
        B,
        replace(B, chosen_ref_logprobs=[-1.0]),
        replace(B, chosen_ref_logprobs=[-1.0], rejected_ref_logprobs=[-1.0]),
        replace(DESIRABLE, chosen_ref_logprobs=[-1.0] * 3, rejected_ref_logprobs=[-1.0]),
    ],
    ids=["none", "one side", "too few", "of an absent side"],
)
def test_a_gap_in_the_reference_log_probs_is_an_error_that_names_the_pair(
    layout: Callable[..., Any], pair: TokenizedPair
):
    with pytest.raises(DataError, match=f"Pair {pair.pair_id} has "):
        layout([REFERENCE[0], pair])


def test_mismatched_completions_are_chosen_sides_of_their_new_prompts():
    with_one = replace(REFERENCE[0], mismatched_ids=[21], mismatched_ref_logprobs=[-0.25])
    masked = replace(with_one, mismatched_ids=[21, 22], mismatched_mask=[False, True])
    assert pack(mismatched([masked])).targets.tolist() == [22]
    assert mismatched([with_one, REFERENCE[1]]) == [
        TokenizedPair("a", A.prompt_ids, [21], [], chosen_ref_logprobs=[-0.25])
    ]
    batch = pack(mismatched([with_one]))
    assert batch.sequence_index.tolist() == [0]
    assert batch.reference_logprobs is not None and batch.reference_logprobs.tolist() == [-0.25]
    assert mismatched(PAIRS) == []


@pytest.mark.parametrize("layout", [pack, pad])
def test_a_position_counts_once_for_each_sequence_by_its_pair_s_weight(layout: Callable[..., Any]):
    batch = layout([replace(A, weight=2.0), *UNPAIRED, *ALIKE])
    counted: dict[int, float] = {}
    for token, count in zip(batch.input_ids.flatten().tolist(), batch.occurrences.flatten().tolist(), strict=True):
        counted[token] = counted.get(token, 0.0) + count
    expected: dict[int, float] = {}
    for pair in [replace(A, weight=2.0), *UNPAIRED, *ALIKE]:
        for answer in filter(None, (pair.chosen_ids, pair.rejected_ids)):
            for token in [*pair.prompt_ids, *answer]:
                expected[token] = expected.get(token, 0.0) + (pair.weight or 1.0)
    counted.pop(0, None)  # padding, which counts nothing
    assert counted == expected


@pytest.mark.parametrize(
    "pairs", [[A], [B], PAIRS, PAIRS[::-1], UNPAIRED, [*UNPAIRED, *PAIRS], [DESIRABLE], ALIKE, MASKED]
)
def test_both_layouts_name_the_same_tokens_in_the_same_order(pairs: list[TokenizedPair]):
    packed, padded = pack(pairs), pad(pairs)
    assert torch.equal(packed.targets, padded.targets)
    assert torch.equal(packed.sequence_index, padded.sequence_index)
    assert packed.num_pairs == padded.num_pairs == len(pairs)


def test_a_prompt_is_computed_once_and_its_tokens_are_never_targets():
    batch = pack(PAIRS)
    assert batch.input_ids.shape == (1, sum(p.num_tokens for p in PAIRS))
    assert not set(batch.targets.tolist()) & {i for p in PAIRS for i in p.prompt_ids}


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("Llama", {}),
        ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("Qwen2", {}),
        ("Qwen3", {}),
        ("Gemma", {}),
        ("GPTNeoX", {"rotary_pct": 0.5}),
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
        ("Granite", {"logits_scaling": 4.0, "attention_multiplier": 0.2}),
        ("Mistral", {"sliding_window": None}),
    ],
)
def test_packed_equals_padded_equals_unshared_in_values_and_gradients(
    saved_model: Build, architecture: str, options: dict[str, Any]
):
    pairs = [*PAIRS, *UNPAIRED, *ALIKE, *MASKED]
    folder = saved_model(architecture, **options)
    packed = scorer(folder)
    assert packed.packs
    values = packed(packed.collate(pairs)).logprobs
    torch.testing.assert_close(values, unshared(folder, pairs), rtol=0, atol=NEAR)
    # Weights that differ by token, so that a gradient in the wrong place shows.
    weights = torch.linspace(-1, 1, len(values))
    (values * weights).sum().backward()

    padded = scorer(folder)
    padded.model.set_attn_implementation("sdpa")
    assert not padded.packs
    plain = padded(padded.collate(pairs)).logprobs
    torch.testing.assert_close(values, plain, rtol=0, atol=NEAR)
    (plain * weights).sum().backward()
    compared = 0
    for (name, mine), other in zip(packed.named_parameters(), padded.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), name
        compared += bool(other.grad is not None and other.grad.abs().max() > 1e-3)
    assert compared > 10
    # Of all: that of a key's bias is nothing, for it moves all attention alike.
    require_gradients([p.grad for p in packed.parameters()], [p.grad for p in padded.parameters()], of_all=True)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("Bloom", {"n_layer": 2, "n_head": 4}),
        ("CodeGen", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}),
        ("Doge", {"keep_window_size": 4}),
        ("StableLm", {}),
        ("Llama4Text", {"attention_chunk_size": 4, "num_local_experts": 2, "intermediate_size_mlp": 48}),
        ("GPTNeo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4}),
    ],
)
def test_a_model_that_does_not_take_the_packed_attention_scores_right_or_is_refused(
    saved_model: Build, architecture: str, options: dict[str, Any]
):
    folder = saved_model(architecture, **options)
    try:
        model = scorer(folder)
    except ConfigError:
        return
    with torch.no_grad():
        got = model(model.collate(PAIRS)).logprobs
    torch.testing.assert_close(got, unshared(folder, PAIRS), rtol=0, atol=NEAR)


@pytest.fixture(scope="module")
def llama(saved_model: Build) -> CompletionScorer:
    return scorer(saved_model("Llama"))


OF_SUM = 6 * NEAR  # an answer has at most six tokens


def sums(model: CompletionScorer, pairs: list[TokenizedPair]) -> Tensor:
    batch = pack(pairs)
    with torch.no_grad():
        return sum_by_sequence(model(batch).logprobs, batch.sequence_index, 2 * len(pairs)).view(-1, 2)


def test_the_chosen_tokens_do_not_reach_the_rejected_ones_nor_the_other_way(llama: CompletionScorer):
    before = sums(llama, [A, B])
    other_chosen = sums(llama, [replace(A, chosen_ids=[40, 41, 42]), B])
    assert torch.equal(other_chosen[0, 1], before[0, 1])
    assert abs(other_chosen[0, 0] - before[0, 0]) > 1e-2
    other_rejected = sums(llama, [replace(A, rejected_ids=[40, 41]), B])
    assert torch.equal(other_rejected[0, 0], before[0, 0])
    assert abs(other_rejected[0, 1] - before[0, 1]) > 1e-2


def test_pairs_of_a_row_do_not_see_each_other(llama: CompletionScorer):
    alone = torch.cat([sums(llama, [pair]) for pair in PAIRS])
    torch.testing.assert_close(sums(llama, PAIRS), alone, rtol=0, atol=OF_SUM)


def test_the_order_of_the_pairs_does_not_matter(llama: CompletionScorer):
    torch.testing.assert_close(sums(llama, PAIRS[::-1]), sums(llama, PAIRS).flip(0), rtol=0, atol=OF_SUM)


def test_swapping_the_answers_swaps_their_scores(llama: CompletionScorer):
    swapped = [replace(p, chosen_ids=p.rejected_ids, rejected_ids=p.chosen_ids) for p in PAIRS]
    torch.testing.assert_close(sums(llama, swapped), sums(llama, PAIRS).flip(1), rtol=0, atol=OF_SUM)


@pytest.mark.parametrize("layout", [pack, pad])
def test_moving_a_batch_moves_every_tensor_and_keeps_the_rest(layout: Callable[..., Any]):
    batch = layout(REFERENCE)
    moved = batch.to(torch.device("meta"))
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            assert getattr(moved, name).device.type == "meta", name
        else:
            assert getattr(moved, name) == value


def test_the_packed_attention_is_the_one_that_runs(llama: CompletionScorer):
    assert llama.model.config._attn_implementation == IMPLEMENTATION
