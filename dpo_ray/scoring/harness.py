"""Benchmark tasks by EleutherAI's lm-evaluation-harness (lm_eval), on one model."""

from __future__ import annotations

import math
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from dpo_ray.config import Model, Tasks
from dpo_ray.data.chat import require_chat_template
from dpo_ray.errors import ConfigError
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.origin import short


class Harness:
    """A model that tasks are tried on, by the harness's own Hugging Face model and its `simple_evaluate`.

    It is asked as an instruction model is used: a question is a user's turn of the model's chat template, with
    model.template_arguments, the examples before it are earlier turns of user and assistant, and an answer that is
    scored or generated begins where the assistant's turn does. All else is the harness's default, its seeds included:
    the numbers are those of `lm-eval run --model hf --apply_chat_template` for the model's folder and dtype.

    Args:
        folder: of one's own task files; None: the library's alone.

    Raises ConfigError where the model has no chat template.
    """

    def __init__(self, model: Model, options: Tasks, folder: Path | None):
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        source = ModelFolder.of(model)
        tokenizer = source.tokenizer()
        require_chat_template(tokenizer, model.path)
        self._options = options
        self._model = HFLM(
            pretrained=str(source.path),
            tokenizer=None if source.template is None else tokenizer,
            dtype=model.dtype,
            device="cuda" if torch.cuda.is_available() else "cpu",
            batch_size=options.batch_size,
            trust_remote_code=source.trust_remote_code,
            chat_template_args=dict(source.template_arguments),
        )
        # A few tasks cut their texts by the tokenizer of the model that is named here.
        self._manager = TaskManager(include_path=folder, metadata={"pretrained": str(source.path)})

    def measure(self, name: str) -> list[dict[str, Any]]:
        """Rows of TASK_MEASURES of a task, a tag or a group.

        Raises ConfigError where it cannot be loaded, as without its data set.
        """
        from lm_eval import simple_evaluate

        try:
            loaded = self._manager.load([name])
        except Exception as error:  # whatever the hub, a file or a task's own code raises
            raise ConfigError(
                f"The task {name} cannot be loaded: {type(error).__name__}: {short(str(error))} Mostly its data set is "
                "lacking: let the nodes reach the Hugging Face hub, or fill its cache (HF_HOME) beforehand; of a task "
                "of your own, check the file. Or leave it out of evaluate.tasks.names."
            ) from error
        group = loaded["groups"].get(name)
        results = simple_evaluate(
            model=self._model,
            tasks=[group] if group is not None else list(loaded["tasks"].values()),
            task_manager=self._manager,
            num_fewshot=self._options.num_fewshot,
            batch_size=self._options.batch_size,
            limit=self._options.limit,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
            log_samples=False,
        )
        return measures(name, results)


def measures(asked: str, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of TASK_MEASURES of what simple_evaluate returns for what was asked for.

    Of a group that has figures of its own there are these alone; of another group or a tag those of its tasks. A metric
    is called as in its key (`acc,none`), but for a filter that is none. Null is a value that is no finite number, and a
    standard error that the harness does not compute.
    """
    found = results["results"]
    names = [asked] if any("," in key for key in found.get(asked, {})) else list(found)
    rows = []
    for task in names:
        of_task = found[task]
        for key, value in of_task.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            rows.append(
                {
                    "asked": asked,
                    "task": task,
                    "num_fewshot": results["n-shot"].get(task),
                    "metric": metric if filtered == "none" else key,
                    "higher_is_better": results["higher_is_better"].get(task, {}).get(metric),
                    "value": _number(value),
                    "stderr": _number(of_task.get(f"{metric}_stderr,{filtered}")),
                    "n": of_task["sample_len"],
                }
            )
    return rows


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None
