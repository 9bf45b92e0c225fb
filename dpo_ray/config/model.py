"""The section `model`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from dpo_ray.config.reward import Dtype
from dpo_ray.config.section import Section

Quantization = Literal["nf4", "int8"]


class LoRA(Section):
    """Train low-rank adapters (arXiv:2106.09685) instead of all weights. The reference is the model without them."""

    rank: int = Field(16, ge=1)
    """Rank of the update of each adapted matrix."""
    alpha: float = Field(32.0, gt=0.0)
    """The update is scaled by alpha / rank."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Names of the adapted layers; all-linear: every linear layer but the output head."""
    export: Literal["adapter", "merged"] = "adapter"
    """What is published: the adapter alone, or the whole model with the adapter merged into its weights."""
    quantization: Quantization | None = None
    """How the frozen weights of the decoder layers' linear layers are held: nf4, in 4 bits (QLoRA, arXiv:2305.14314);
    int8, in 8 bits, scaled by row (arXiv:2208.07339). They are computed with in model.dtype, and the reference is the
    model with these weights, scored with reference.engine=torch. Merged, the adapter is added to these weights; alone,
    it is published for the model as it was. Left out: in model.dtype, as all other frozen weights are. By bitsandbytes,
    of the extra `memory`."""

    def identity(self) -> dict[str, Any]:
        """The options as a training is known by them."""
        return self.model_dump(mode="json", exclude=set() if self.quantization else {"quantization"})


class Model(Section):
    """The model that is trained, which is the reference too."""

    path: str
    """A Hugging Face folder, a PEFT adapter's folder (taken merged into its base), a .gguf file, a hub id, or
    package://<python package>/<file.gguf>."""
    revision: str | None = None
    """Revision of a hub id; a local path has none."""
    dtype: Dtype = "float32"
    """Precision of the trainer's forward and of the reference scores: the two must be equal to agree."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model. Only for models whose code you have read."""
    chat_template: str | None = None
    """A file with the chat template (Jinja) to use in place of the model's own, here and in what is published: a path
    that every node sees, or a URI. With a job it may travel along (submit --ship)."""
    template_arguments: dict[str, Any] = Field(default_factory=dict)
    """Given to the chat template by name wherever it is rendered, for training and for sampling alike, such as
    {enable_thinking: false}."""
    lora: LoRA | None = None
    """Train adapters only; left out: all weights."""

    @property
    def quantization(self) -> Quantization | None:
        """How the frozen weights of linear layers are held in training; None: in model.dtype, or trained."""
        return self.lora.quantization if self.lora is not None else None
