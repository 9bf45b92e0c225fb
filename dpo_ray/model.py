"""Finding, loading, hashing and saving the model; its forward pass down to token log-probs."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs as pafs
import torch
from torch import Tensor, nn

from dpo_ray import attention
from dpo_ray.artifacts import digest, file_hash
from dpo_ray.errors import ConfigError
from dpo_ray.logprobs import token_logprobs
from dpo_ray.packing import MicroBatch, pack, pad
from dpo_ray.pairs import TokenizedPair
from dpo_ray.progress import say
from dpo_ray.storage import Location

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGE = "package://"


def package_file(uri: str) -> Path:
    """The file behind package://<importable package>/<path inside it>. Raises ConfigError."""
    package, _, inside = uri.removeprefix(PACKAGE).partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{uri}: the Python package {package} is not installed. Install it, or name another path.")
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    if not path.is_file():
        raise ConfigError(f"{uri}: the installed package {package} has no file {inside}.")
    return path


def cache_folder() -> Path:
    """Where converted models are kept between runs: $DPO_RAY_CACHE, or dpo-ray below the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "dpo-ray"
    return Path(os.environ.get("DPO_RAY_CACHE", default)).expanduser()


def resolve(path: str, revision: str | None = None) -> Path:
    """The local folder of a model: a folder as it is; a GGUF file, a URI or a hub id as a copy made once.

    Raises ConfigError where there is nothing to load.
    """
    local = Path(path).expanduser()
    if revision is not None and (path.startswith(PACKAGE) or local.exists()):
        raise ConfigError(
            f"model.revision is {revision}, but model.path={path} is local, and local files have no revisions. Leave "
            "model.revision out, or name a hub id."
        )
    if path.startswith(PACKAGE):
        return converted_gguf(package_file(path))
    if local.suffix == ".gguf" and local.is_file():
        return converted_gguf(local)
    if "://" in path:
        return _fetched(Location.of(path))
    if local.is_dir():
        if not (local / "config.json").is_file() or not list(local.glob("*.safetensors")):
            raise ConfigError(
                f"model.path is {path}, but that folder has no config.json with *.safetensors beside it. Name a "
                "folder written by save_pretrained; weights in pickle files are not loaded."
            )
        return local.absolute()
    if local.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise ConfigError(
            f"model.path is {path}, and there is no such folder. Name a Hugging Face model folder, a "
            ".gguf file or a hub id such as org/name."
        )
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"]
        return Path(snapshot_download(path, revision=revision, allow_patterns=wanted))
    except Exception as error:
        raise ConfigError(
            f"model.path is {path}: it is no local folder, and the hub did not give it ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). Check the name, the network and the access rights, or name a "
            "folder."
        ) from error


def converted_gguf(gguf: Path) -> Path:
    """A GGUF file as a Hugging Face folder in float32, made once and kept in the cache folder.

    Safe when several processes ask at the same time: one converts, the others wait for it.
    """
    target = cache_folder() / "models" / f"{gguf.stem}-{file_hash(Location.of(gguf))[:12]}"
    with _making(target) as partial:
        if partial is not None:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            # The tensors are dequantized already; transformers would otherwise refuse to save them.
            model.hf_quantizer = None
            del model.config.quantization_config
            model.save_pretrained(partial)
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
    return target


def _fetched(remote: Location) -> Path:
    """A model folder of an object store, copied once into the cache folder; a changed one is copied again."""
    fs, path = remote.filesystem()
    infos = sorted(fs.get_file_info(pafs.FileSelector(path, allow_not_found=True)), key=lambda i: i.path)
    files = [(i.base_name, i.size, i.mtime_ns) for i in infos if i.type == pafs.FileType.File]
    if not any(name == "config.json" for name, _, _ in files):
        raise ConfigError(
            f"model.path is {remote}, and there is no config.json in it. Name a folder written by save_pretrained."
        )
    target = cache_folder() / "models" / f"{remote.name}-{digest([remote.uri, files])}"
    with _making(target) as partial:
        if partial is not None:
            for name, _, _ in files:
                (remote / name).copy_to(Location.of(partial / name))
    return target


@contextmanager
def _making(target: Path) -> Iterator[Path | None]:
    """A folder to fill, which becomes the target when the block ends well; None where the target exists.

    Several processes may ask at the same time: one fills it, the others wait.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            yield None
            return
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".making-"))
        try:
            yield partial
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def weights_hash(folder: Path) -> str:
    """Digest over the configuration and the weights of a model folder, by content.

    Kept beside the user's cache under the files' names, sizes and times, for large weights are slow to read.
    """
    files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = digest([str(folder), stats])
    remembered = cache_folder() / "hashes" / key
    if remembered.is_file():
        return remembered.read_text()
    value = digest([(f.name, file_hash(Location.of(f))) for f in files])
    Location.of(remembered).write_bytes(value.encode())
    return value


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder. Raises ConfigError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The model folder {folder} has no tokenizer that can be loaded ({error}). Save it there "
            "with tokenizer.save_pretrained."
        ) from error


def load_policy(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model with float32 weights, dropout off, on the packed attention where it can serve."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=trust_remote_code, use_safetensors=True
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    if not _use_packed_attention(model):
        say(
            "model",
            f"{model.config.model_type} does not run on packed pairs; each completion is computed with its prompt",
        )
    return model


def _use_packed_attention(model: PreTrainedModel) -> bool:
    """Switch to the packed attention if the model gives the same log-probs with it; otherwise leave it as it was.

    Some models claim to call transformers' attention interface and do not, or keep state between tokens; their
    packed log-probs would be wrong without any error, so it is tried on a few tokens.
    """
    if not attention.serves(model.config) or not getattr(model, "_supports_attention_backend", False):
        return False
    before, was_training = model.config._attn_implementation, model.training
    ids = [i % model.config.vocab_size for i in range(7, 7 + 19)]
    pairs = [TokenizedPair("a", ids[:5], ids[5:8], ids[8:12]), TokenizedPair("b", ids[12:15], ids[15:18], ids[18:])]
    scorer = CompletionScorer(model.eval(), torch.float32)
    with torch.inference_mode():
        expected = scorer(pad(pairs))
        attention.register()
        model.set_attn_implementation(attention.IMPLEMENTATION)
        try:
            serves = torch.allclose(scorer(pack(pairs)), expected, rtol=0, atol=1e-3)
        except (RuntimeError, TypeError, ValueError, IndexError):
            serves = False  # it cannot take the layout at all
    if not serves:
        model.set_attn_implementation(before)
    model.train(was_training)
    return serves


class CompletionScorer(nn.Module):
    """The trainer's forward pass: micro-batch → log-probs of its completion tokens.

    The same module scores the reference (engine `torch`), calibrates vLLM's scores, trains and evaluates.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype):
        super().__init__()
        self.model = model
        self.dtype = dtype

    @property
    def packs(self) -> bool:
        """Whether the model runs on the packed, prefix-shared layout."""
        return self.model.config._attn_implementation == attention.IMPLEMENTATION

    def collate(self, pairs: list[TokenizedPair]) -> MicroBatch:
        """The layout that this model can take."""
        return pack(pairs) if self.packs else pad(pairs)

    def forward(self, batch: MicroBatch) -> Tensor:
        """Log-probs [N] in float32 of the micro-batch's completion tokens, in nats."""
        device = batch.input_ids.device.type
        autocast = torch.autocast(device, self.dtype) if self.dtype != torch.float32 else nullcontext()
        with autocast:
            extra = {"segments": batch.segments} if batch.segments is not None else {}
            hidden = self.model.base_model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
                **extra,
            ).last_hidden_state
            return token_logprobs(hidden.flatten(0, 1)[batch.predictors], head(self.model), batch.targets)


def head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Hidden states [N, H] → logits [N, V], with the scaling and soft cap that the model's configuration names."""
    output = model.get_output_embeddings()
    cap = getattr(model.config, "final_logit_softcapping", None)
    scale = getattr(model.config, "logit_scale", None) or 1 / (getattr(model.config, "logits_scaling", None) or 1)

    def logits(hidden: Tensor) -> Tensor:
        scaled = output(hidden) * scale if scale != 1 else output(hidden)
        return cap * torch.tanh(scaled / cap) if cap else scaled

    return logits


def torch_dtype(name: str) -> torch.dtype:
    """float32 or bfloat16 by its name in the configuration."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
