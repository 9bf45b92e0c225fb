"""What the runs of a folder are given: its model and its pairs, found or made where no part has done so."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.record import write_json, write_lines
from benchmarks.side_by_side import SEED, preference_pairs, token_ids
from benchmarks.speed.pairs import generated_pairs, select
from benchmarks.speed.runs import Place, Setting
from dpo_ray.training.flops import ModelShape


def write_pairs(place: Place, setting: Setting) -> None:
    """Tokenize the pairs of a data set."""
    rows = select(tokenized(place, setting), setting.steps * setting.pairs_per_step, setting.max_tokens)
    write_lines(place.pairs, rows)


def tokenized(place: Place, setting: Setting) -> Iterator[dict[str, Any]]:
    """The pairs of a data set in an order drawn from the seed; the generated ones never end."""
    from dpo_ray.model.folders import load_tokenizer

    model, shape = model_of(place.folder, setting)
    if place.data == "generated":
        yield from generated_pairs(shape.head[0])
        return
    real = os.environ.get("DPO_RAY_DATA")
    if real is None:
        sys.exit(f"DPO_RAY_DATA must name the folder of {place.data}; --data generated needs none.")
    pairs = list(preference_pairs(Path(real) / place.data))
    random.Random(SEED).shuffle(pairs)
    tokenizer = load_tokenizer(Path(model))
    for pair in pairs:
        yield token_ids(tokenizer, pair)


def model_of(folder: Path, setting: Setting) -> tuple[str, ModelShape]:
    """The model's folder and shape; found or made where no part has done so."""
    path = folder / "model.json"
    if not path.is_file():
        from transformers import AutoConfig

        from dpo_ray.model.resolve import resolve

        source = resolve(setting.model)
        if setting.random_llama is not None:
            source = _random_llama(source, setting.random_llama, folder / "model")
        shape = ModelShape.of(AutoConfig.from_pretrained(source))
        write_json(path, {"path": str(source), "shape": asdict(shape)})
    found = json.loads(path.read_text())
    return found["path"], ModelShape.from_json(found["shape"])


def _random_llama(like: Path, size: str, target: Path) -> Path:
    """A Llama with random weights and the tokenizer of another model.

    size: HIDDENxLAYERS; heads have 64 dimensions, and four of them share keys and values where that divides.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    hidden, _, layers = size.partition("x")
    heads = int(hidden) // 64
    config = AutoConfig.from_pretrained(like)
    config.update(
        {
            "hidden_size": heads * 64,
            "intermediate_size": heads * 64 * 8 // 3 // 64 * 64,
            "num_hidden_layers": int(layers),
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 4 if heads % 4 == 0 else heads,
            "head_dim": 64,
        }
    )
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(target)
    AutoTokenizer.from_pretrained(like).save_pretrained(target)
    return target
