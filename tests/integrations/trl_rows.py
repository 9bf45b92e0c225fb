"""Rows as TRL's own trainers prepare them, for a Python that has TRL: from stdin to stdout, in JSON.

    python trl_rows.py TOKENIZER < [{"trainer": "dpo", "rows": […]}, …]

Of each row: the fields that TRL makes of it, and the ids of its sequences where it is conversational.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl.data_utils import is_conversational, maybe_extract_prompt
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

TRAINERS = {"dpo": DPOTrainer, "kto": KTOTrainer}
OPTIONS = SimpleNamespace(dataset_num_proc=None, max_length=None)


def prepared(trainer: str, rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        fields = dict(maybe_extract_prompt(row)) if "chosen" in row else row
        fields = {
            name: fields[name] for name in ("prompt", "chosen", "rejected", "completion", "label") if name in fields
        }
        ids = None
        if is_conversational(fields):
            self = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False)
            made = TRAINERS[trainer]._prepare_dataset(self, Dataset.from_list([fields]), tokenizer, OPTIONS, "eval")
            ids = {name: made[0][name] for name in made.column_names if name.endswith("_ids")}
        found.append({"fields": fields, "ids": ids})
    return found


if __name__ == "__main__":
    loaded = AutoTokenizer.from_pretrained(sys.argv[1])
    given = json.load(sys.stdin)
    json.dump([prepared(one["trainer"], one["rows"], loaded) for one in given], sys.stdout, ensure_ascii=False)
