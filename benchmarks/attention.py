"""Which models run on packed pairs that share their prompts, how exactly, and how fast against padding?

    python -m benchmarks.attention

Small models of many families are built from their configurations, with random weights and sliding windows far shorter
than prompts and answers. Log-probs and gradients of a micro-batch are computed in float32 on three layouts: shared (the
trainer takes it where it is exact), packed (no padding, but the prompt once for each answer) and padded (transformers'
own attention). The truth is transformers' own forward in float64 over each sequence alone, eager, with nothing padded.
Tokens a second of one core are of forward and backward on a wider model of the same kind, a prompt counted once for
each answer.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.record import OUR_PACKAGES, ROOT, environment, table, versions
from dpo_ray.model import attention
from dpo_ray.model.packing import MicroBatch, pack, pad
from dpo_ray.model.policy import CompletionScorer, load_policy
from dpo_ray.pairs import TokenizedPair

REPORT = ROOT / "benchmarks" / "attention.md"
BEGIN = "<!-- begin of what benchmarks/attention.py writes -->"
END = "<!-- end of what benchmarks/attention.py writes -->"

VOCABULARY = 64
WINDOW = 5
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_STATE = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}


@dataclass(frozen=True)
class Family:
    """A kind of model."""

    name: str
    architecture: str
    """As transformers calls it, without its suffix."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the configuration, beside SMALL."""
    layout: str = "shared"
    """The one that the trainer takes."""
    timed: bool = True
    """Whether its speed is taken: not where there is one layout only, or without kernels a loop over all tokens."""

    def config(self, **other: Any) -> Any:
        return getattr(transformers, f"{self.architecture}Config")(**{**SMALL, **self.options, **other})

    @property
    def windowed(self) -> bool:
        return self.options.get("sliding_window") is not None


FAMILIES = [
    Family("Llama", "Llama"),
    Family("SmolLM2 (Llama, tied)", "Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    Family("SmolLM3, mixed windows", "SmolLM3", {**_MIXED, "use_sliding_window": True}),
    Family("Mistral, window", "Mistral", {"sliding_window": WINDOW}),
    Family("Phi-3, window", "Phi3", {"sliding_window": WINDOW}),
    Family("StarCoder2, window", "Starcoder2", {"sliding_window": WINDOW}),
    Family("Qwen2, window from a layer on", "Qwen2", {
        "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    Family("Qwen3, mixed windows", "Qwen3", {**_MIXED, "use_sliding_window": True}),
    Family("OLMo 3, mixed windows", "Olmo3", _MIXED),
    Family("Command R7B, mixed windows", "Cohere2", _MIXED),
    Family("EXAONE 4, mixed windows", "Exaone4", _MIXED),
    Family("Gemma 2, windows, soft caps", "Gemma2", {
        **_MIXED, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    Family("Gemma 3, mixed windows", "Gemma3Text", {**_MIXED, "query_pre_attn_scalar": 8}),
    Family("Gemma 4, mixed windows", "Gemma4Text", {
        **_MIXED, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8, "global_head_dim": 8}),
    Family("gpt-oss, windows, sinks, experts", "GptOss", {
        **_MIXED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("Mixtral, window, experts", "Mixtral", {
        "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("Qwen3-MoE, experts", "Qwen3Moe", {**_EXPERTS, "num_experts": 4}),
    Family("OLMoE, experts", "Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    Family("DeepSeek-V3, latent attention, experts", "DeepseekV3", {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
        "first_k_dense_replace": 1, "moe_intermediate_size": 16, "num_key_value_heads": 4}),
    Family("Qwen3-Next, linear attention, experts", "Qwen3Next", {**_DELTA, **_EXPERTS, "num_experts": 4},
           "shared, linear_attn apart"),
    Family("Qwen3.5, linear attention", "Qwen3_5Text", _DELTA, "shared, linear_attn apart"),
    Family("Qwen3.5-MoE, linear attention, experts", "Qwen3_5MoeText", {**_DELTA, **_EXPERTS, "num_experts": 4},
           "shared, linear_attn apart"),
    Family("OLMo Hybrid, linear attention", "OlmoHybrid", _DELTA, "shared, linear_attn apart"),
    Family("LFM2, convolutions", "Lfm2", {"layer_types": ["conv", "full_attention"]}, "shared, conv apart"),
    Family("Bamba, Mamba-2", "Bamba", {**_STATE, "attn_layer_indices": [1]}, "shared, mamba apart"),
    Family("Granite 4, Mamba-2, experts", "GraniteMoeHybrid", {
        **_STATE, "layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 16}, "shared, mamba apart"),
    Family("Falcon-H1, Mamba-2 beside attention", "FalconH1", {**_STATE, "mamba_d_ssm": 64}, "shared, mamba apart"),
    Family("Jamba, Mamba, experts", "Jamba", {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8}, "shared, mamba apart", timed=False),
    Family("Nemotron-H, Mamba-2", "NemotronH", {
        "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "attention", "mlp"]}, "padded"),
    Family("Mamba-2", "Mamba2", {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}, "padded"),
]  # fmt: skip


def saved(family: Family, folder: Path, **other: Any) -> Path:
    """The folder of a random model, with weights as large as trained ones: with small ones attention hardly matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(family.config(**other))
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                fan_in = parameter.shape[-1]
                torch.nn.init.normal_(parameter, std=min(0.15, fan_in**-0.5))
            else:  # norms, biases, sinks, decays
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    return folder


def micro_batch(seed: int = 1) -> list[TokenizedPair]:
    """Pairs whose lengths differ a hundredfold, some that begin alike, and some that lack a side."""
    random = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=random).tolist()

    alike = ids(7)
    return [
        TokenizedPair("a", ids(30), ids(20), ids(14)),
        TokenizedPair("b", ids(1), ids(1), ids(100)),
        TokenizedPair("c", ids(2), alike + ids(9), alike + ids(1)),
        TokenizedPair("d", ids(9), ids(7), []),
        TokenizedPair("e", ids(9), [], ids(8)),
        TokenizedPair("f", ids(7), alike + ids(3), alike),
    ]


@dataclass(frozen=True)
class Computed:
    """Log-probs [N] of a micro-batch, and the gradients of a sum of them by parameter."""

    values: Tensor
    gradients: dict[str, Tensor | None]

    @classmethod
    def of(cls, values: Tensor, model: torch.nn.Module) -> Computed:
        # Weights that differ by token, so that a gradient in the wrong place shows.
        model.zero_grad()
        (values * torch.linspace(-1, 1, len(values), dtype=values.dtype)).sum().backward()
        gradients = {n: None if p.grad is None else p.grad.double() for n, p in model.named_parameters()}
        return cls(values.detach().double(), gradients)

    def apart(self, truth: Computed) -> tuple[float, float]:
        """Largest |Δ| of a value, and of a parameter's gradient as ‖Δg‖ over the norm of all gradients."""
        norms = [g.norm() for g in truth.gradients.values() if g is not None]
        whole = float(torch.stack(norms).norm())
        gradients = [
            float((mine - other).norm()) / whole
            for mine, other in ((self.gradients[name], other) for name, other in truth.gradients.items())
            if mine is not None and other is not None
        ]
        return float((self.values - truth.values).abs().max()), max(gradients)


def alone(folder: Path, pairs: Sequence[TokenizedPair], **options: Any) -> Computed:
    """The truth: each sequence by itself, by transformers' own forward in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager", **options
    ).double()  # buffers too
    values = []
    for pair in pairs:
        for answer in filter(None, (pair.chosen_ids, pair.rejected_ids)):
            logits = model(torch.tensor([pair.prompt_ids + answer]), use_cache=False).logits[0]
            predicting = logits[len(pair.prompt_ids) - 1 : -1].log_softmax(-1)
            values.append(predicting.gather(-1, torch.tensor(answer)[:, None])[:, 0])
    return Computed.of(torch.cat(values), model)


def one_sided(pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """Each answer as a pair of its own, so that nothing is shared."""
    halves = ((replace(p, rejected_ids=[]), replace(p, chosen_ids=[])) for p in pairs)
    return [half for both in halves for half in both if half.chosen_ids or half.rejected_ids]


class Layouts:
    """A model, and its micro-batch in the layouts that it takes."""

    def __init__(self, folder: Path):
        self.scorer = CompletionScorer(load_policy(folder)).train()
        self.own = transformers.AutoModelForCausalLM.from_pretrained(folder).config._attn_implementation
        if getattr(self.scorer.model.config, "attn_logit_softcapping", None) is not None:
            self.own = "eager"  # the others leave the cap out
        self.layout = self.scorer.layout

    def names(self) -> list[str]:
        return ["padded"] if self.layout == "padded" else ["shared", "packed", "padded"]

    def batch(self, name: str, pairs: list[TokenizedPair]) -> MicroBatch:
        """Ready to be computed; the model is switched to what the layout needs."""
        self.scorer.model.set_attn_implementation(self.own if name == "padded" else attention.IMPLEMENTATION)
        return {"shared": pack, "packed": lambda some: pack(one_sided(some)), "padded": pad}[name](pairs)


def exactness(family: Family, pairs: list[TokenizedPair]) -> tuple[str, dict[str, tuple[float, float]]]:
    """The layout that the trainer takes, and of each how far it is from the truth."""
    with tempfile.TemporaryDirectory() as place:
        folder = saved(family, Path(place))
        truth, layouts = alone(folder, pairs), Layouts(folder)
        found = {}
        for name in layouts.names():
            values = layouts.scorer(layouts.batch(name, pairs)).logprobs
            found[name] = Computed.of(values, layouts.scorer.model).apart(truth)
    return layouts.layout, found


_WIDE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "head_dim": 64, "vocab_size": 2048,
    "max_position_embeddings": 2048,
}  # fmt: skip
_WIDER_PARTS = {  # of what some families have beside
    "sliding_window": 64, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256,
    "linear_key_head_dim": 32, "linear_value_head_dim": 64, "mamba_d_head": 128, "mamba_d_ssm": 512,
    "mamba_head_dim": 64, "mamba_d_state": 32, "ssm_state_size": 32, "query_pre_attn_scalar": 64, "q_lora_rank": 128,
    "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64,
    "vocab_size_per_layer_input": 2048, "hidden_size_per_layer_input": 64, "global_head_dim": 64,
    "shared_intermediate_size": 256,
}  # fmt: skip


def long_pairs(seed: int = 2) -> list[TokenizedPair]:
    """Four pairs as people's dialogues are: a prompt of 100 to 500 tokens, answers of 50 to 200."""
    random = torch.Generator().manual_seed(seed)

    def ids(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most, (1,), generator=random))
        return torch.randint(3, 2048, (length,), generator=random).tolist()

    return [TokenizedPair(str(n), ids(100, 500), ids(50, 200), ids(50, 200)) for n in range(4)]


def speeds(family: Family, pairs: list[TokenizedPair], rounds: int) -> dict[str, float]:
    """Tokens in a second of one core by layout, forward and backward; the layouts take turns, the median round counts.

    Time that the core gave to others does not count.
    """
    wider = {name: value for name, value in _WIDER_PARTS.items() if name in family.options}
    if family.architecture == "Mamba2":
        wider = {"num_heads": 8, "head_dim": 64, "state_size": 32}
    if family.architecture == "DeepseekV3":
        wider["head_dim"] = 32
    tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    with tempfile.TemporaryDirectory() as place:
        layouts = Layouts(saved(family, Path(place), **{**_WIDE, **wider}))
        took: dict[str, list[float]] = {name: [] for name in layouts.names()}
        for turn in range(rounds + 1):
            for name, times in took.items():
                batch = layouts.batch(name, pairs)
                began = time.process_time()
                layouts.scorer(batch).logprobs.sum().backward()
                if turn:  # the first one warms up
                    times.append(time.process_time() - began)
                layouts.scorer.zero_grad()
    return {name: tokens / statistics.median(times) for name, times in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="of each timing; 0 times nothing")
    parser.add_argument("--only", default="", help="families whose name has this in it; nothing is written then")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    for family in FAMILIES:
        if arguments.only in family.name:
            layout, found = exactness(family, micro_batch())
            timed = arguments.rounds and family.timed and layout != "padded"
            rates = speeds(family, long_pairs(), arguments.rounds) if timed else {}
            rows.append(_row(family, layout, found, rates))
            print(" | ".join(rows[-1]), flush=True)
            gc.collect()
    text = _report(rows, arguments.rounds)
    print(text)
    if not arguments.only:
        before, _, rest = REPORT.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        REPORT.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def _row(family: Family, layout: str, found: dict[str, tuple[float, float]], rates: dict[str, float]) -> list[str]:
    def apart(name: str) -> str:
        return "{:.1e}, {:.1e}".format(*found[name]) if name in found else "–"

    def rate(name: str) -> str:
        return f"{rates[name] / rates['padded']:.2f}" if name in rates else "–"

    padded = f"{rates['padded']:.0f}" if rates else "–"
    names = ("shared", "packed", "padded")
    return [family.name, layout, *map(apart, names), padded, *map(rate, names[:2])]


def _report(rows: list[list[str]], rounds: int) -> str:
    about = environment(OUR_PACKAGES)
    head = [
        "family", "layout taken", "shared: values, gradients", "packed: values, gradients",
        "padded: values, gradients", "padded, tokens / core-second", "packed ×", "shared ×",
    ]  # fmt: skip
    swapped = [[*row[:6], row[7], row[6]] for row in rows]
    return (
        f"\n## {date.today()} (commit {about['commit']})\n\n{versions(about)}; {about['hardware']}; median of {rounds} "
        f"rounds.\n\n{table(head, swapped)}\n"
    )


if __name__ == "__main__":
    main()
