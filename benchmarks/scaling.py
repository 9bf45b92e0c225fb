"""On paper: pairs a second by number of nodes, what saturates first, and where the design would have to change.

    python -m benchmarks.scaling [--write]

Made of measured parts, each with the table that it stands in, and of assumptions, each with its source. A stage takes
as long as the slowest of what goes on side by side in it, and beside that what one process does alone. --write puts
the tables into scaling.md, between its two marks.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.record import ROOT, table

REPORT = ROOT / "benchmarks" / "scaling.md"
BEGIN, END = "<!-- made by benchmarks/scaling.py -->", "<!-- end -->"
NODES = (1, 2, 4, 8, 16, 64, 256)
SIZES = (10**6, 10**7, 10**8, 10**9)


@dataclass(frozen=True)
class Part:
    """A figure that the rest is made of."""

    what: str
    value: float
    told: str
    """The figure with its unit, as a person reads it."""
    source: str
    """The table and its date; or, of what nobody measured, where the assumption comes from."""
    quote: str | None = None
    """What of the table it is made from, to the letter; None: assumed."""


INGEST_ROW = "| 800 MiB, 10.0× | 600,423 | 1585 | ingest 47, duplicates 1, tokenize 298, data report 32 |"
SPEED_ROW = "| hh_helpful, float32 | ours | 308 | 7.86 | 14.8 | 4.6 | 1096 |"
OF_INGEST, OF_SPEED, OF_ROWS = "ingest.md, 2026-11-26", "speed.md, 2026-11-22", "rows.md, 2026-11-26"
OF_COORDINATOR, OF_END = "coordinator.md, 2026-11-27", "stage_end.md, 2026-11-26"
_MIB = 2**20
_PARTS_OF_FILE = 16  # as dpo_ray/data/raw/parts.py has it

PARTS: dict[str, Part] = {
    "row_bytes": Part("text of a pair", 800 * _MIB / 600_423, "1,397 bytes", OF_INGEST, INGEST_ROW),
    "ingest": Part("ingest, a core", 600_423 / 47 / 2, "6,388 pairs/s", OF_INGEST, INGEST_ROW),
    "tokenize": Part("tokenization, a core", 600_423 / 298 / 2, "1,007 pairs/s", OF_INGEST, INGEST_ROW),
    "report": Part("data report, a core", 600_423 / 32 / 2, "9,382 pairs/s", OF_INGEST, INGEST_ROW),
    "ids": Part("ids of a row, a core", 2.9e-6, "2.9 µs", OF_ROWS, "2.9 µs, 3 bytes"),
    "bucket": Part("search for duplicates among rows, a core", 1.3e-6, "1.3 µs a row", OF_ROWS, "1.3 µs, 11 bytes"),
    "left_out_bytes": Part("driver, for the rows that are left out", 11, "11 bytes a row", OF_ROWS, "1.3 µs, 11 bytes"),
    "index": Part("index, in the driver", 0.21e-6, "0.21 µs a row", OF_ROWS, "0.21 µs, 1 byte a row"),
    "index_bytes": Part("index on disk", 16, "16 bytes a row", OF_ROWS, "is 16 bytes a row on"),
    "take_over": Part(
        "driver, what is there already, and the manifest", 1.0 / 2020, "0.5 ms a shard", OF_END,
        "| now | 2020 shards, all but the new shards | 1.0 | 8 | 0.004 | 0.00 |",
    ),
    "manifest_bytes": Part("manifest", 449e3 / 2020, "222 bytes a shard", OF_END, "now 449 kB"),
    "pair_tokens": Part(
        "tokens of a pair of hh_helpful, its prompt once", 1763 / 4, "441", OF_SPEED,
        "one step of 4 pairs of hh_helpful (1763 shared tokens in one micro-batch",
    ),
    "real_tokens": Part("the same, the prompt for each answer", 308 * 7.86 / 4, "605", OF_SPEED, SPEED_ROW),
    "cpu_train": Part("training of SmolLM2-135M, 2 cores, float32", 308, "308 real tokens/s", OF_SPEED, SPEED_ROW),
    "cpu_score": Part("its reference, by the trainer's forward", 1096, "1,096 real tokens/s", OF_SPEED, SPEED_ROW),
    "imbalance": Part(
        "slowest rank over the mean", 1.019, "1.019", OF_SPEED, "| hh_helpful | 680 | 1.174, 1.649 | **1.019**, 1.079 |"
    ),
    "message": Part(
        "driver, a shard of a stage", 7.57e-3, "7.57 ms of CPU", OF_COORDINATOR,
        "| driver's CPU a shard of a stage | 7.57 ms |",
    ),
    "block": Part(
        "a block of the training feed", 14.1e-3, "14.1 ms", OF_COORDINATOR,
        "| a block of the training feed | 14.1 ms |",
    ),
    "pack": Part(
        "pairs that one task packs for the feed", 14_500, "14,500 pairs/s", OF_COORDINATOR,
        "| pairs that one task packs for the feed | 1.45e+04 pairs/s |",
    ),
    "history": Part(
        "a step of the history, at each later checkpoint", 11.6e-6, "11.6 µs", OF_COORDINATOR,
        "| a step of the history, written at each later checkpoint | 11.6 µs |",
    ),
    "history_bytes": Part(
        "a step of the history in rank 0's memory", 1810, "1,810 bytes", OF_COORDINATOR,
        "| a step of the history in memory | 1.81e+03 bytes |",
    ),
    "entry_bytes": Part(
        "a shard of a manifest in the driver's memory", 1480, "1,480 bytes", OF_COORDINATOR,
        "| a shard of a manifest in memory | 1.48e+03 bytes |",
    ),
    "keep_id": Part(
        "driver, an id that is kept when a model is published", 1.99e-6, "1.99 µs", OF_COORDINATOR,
        "| a row whose id is kept when a model is published | 1.99 µs |",
    ),
    "sort_left_out": Part(
        "driver, a row that is left out", 0.448e-6, "0.448 µs", OF_COORDINATOR,
        "| a row that is left out, sorted to its shard | 0.448 µs |",
    ),
    "part_bytes": Part("text of a shard", 64 * _MIB, "64 MiB", "dpo_ray/data/raw/parts.py; files are of 1 GiB or more"),
    "left_out_share": Part("rows that are left out", 0.02, "1 in 50", "as in rows.md"),
    "cores": Part("cores of a data node", 8, "8", "group cpu in cluster/manifests; a core as fast as those measured"),
    "head_bytes": Part("memory of the head", 12 * 2**30, "12 GiB", "cluster/manifests/kubernetes/base/rayjob.yaml"),
    "node_net": Part("a data node and the store", 1e9, "1 GB/s", "of the 12.5 Gbit/s that such machines are sold with"),
    "gpu_node_net": Part("a GPU node and the store", 2e9, "2 GB/s", "a guess"),
    "store_net": Part("the store, all nodes together", 25e9, "25 GB/s", "a guess: ask who runs it"),
    "store_gets": Part("the store, reads below one prefix", 5500, "5,500/s", "Amazon's S3 performance guide"),
    "page": Part("a page of 1,000 names of a listing", 0.1, "0.1 s", "a guess"),
    "gpus": Part("GPUs of a node", 8, "8 H100", "a common machine"),
    "peak": Part("peak of a GPU in bfloat16", 989e12, "989 TFLOP/s", "NVIDIA's data sheet, dense"),
    "mfu": Part("share of it that is reached", 0.4, "0.4", "a guess; nothing of this project was measured at 8B"),
    "params": Part("weights of the larger model", 8.03e9, "8.03 billion", "Llama 3.1 8B"),
    "small_params": Part("weights of the smaller model", 135e6, "135 million", "SmolLM2-135M"),
    "nvlink": Part("GPUs of one node among themselves", 450e9, "450 GB/s", "NVIDIA's data sheet, one direction"),
    "fabric": Part("GPU nodes among themselves", 200e9, "200 GB/s a node", "half of the 3,200 Gbit/s of such machines"),
    "batch": Part("train.global_batch_size", 512, "512 pairs", "a guess at what still learns"),
    "microbatch": Part("train.tokens_per_microbatch on a GPU", 16_384, "16,384", "a guess"),
    "steps_per_group": Part("steps that travel together in the feed", 8, "8", "dpo_ray/on_ray/stream.py"),
    "checkpoint_steps": Part("train.checkpoint_every_steps", 50, "50", "its default"),
    "disk": Part("a node's disk, written", 4e9, "4 GB/s", "a guess: NVMe"),
    "eval_pairs": Part("evaluate.max_pairs", 100_000, "100,000", "its default"),
}  # fmt: skip


def part(name: str) -> float:
    return PARTS[name].value


WORDS = {
    "cpu": "the workers' cores",
    "gpu": "the GPUs",
    "few": "there are fewer shards than workers",
    "net": "bytes to and from the object store",
    "req": "requests to the object store",
    "msg": "the driver, a message for each shard",
    "drv": "the driver alone: index, rows left out, ids that are kept, listings and manifests",
    "feed": "the training feed, a block for each rank and 8 steps, through one process",
    "pack": "the training feed, packed by one task",
    "grad": "gradients and weights between the workers",
    "batch": "there are fewer pairs in a step than workers",
    "ckpt": "checkpoints",
    "hist": "the metrics of all steps, written again at each checkpoint",
}


@dataclass(frozen=True)
class Time:
    """Of a stage, in seconds."""

    beside: Mapping[str, float]
    """What goes on side by side: the slowest counts."""
    alone: Mapping[str, float]
    """What is done beside that, with nothing else going on."""

    @property
    def seconds(self) -> float:
        return max(self.beside.values()) + sum(self.alone.values())

    @property
    def first(self) -> str:
        """What takes longest."""
        return max([*self.beside.items(), *self.alone.items()], key=lambda one: one[1])[0]


@dataclass(frozen=True)
class Model:
    """A model, and the nodes that score and train it."""

    name: str
    resource: str
    workers: int
    """Of a node."""
    forward: float
    """Seconds of a worker for a pair."""
    training: float
    """Seconds of a worker for a pair, forward and backward."""
    step_bytes: float
    """Between a node and the others, for each micro-batch."""
    link: Callable[[int], float]
    """Nodes → bytes a second."""
    microbatch: float
    state_bytes: float
    """Of a checkpoint."""
    net: float
    """Of a node and the store, bytes a second."""


def large() -> Model:
    flops = part("mfu") * part("peak")
    pair = 2 * part("params") * part("pair_tokens")
    return Model(
        "8B", "gpu", int(part("gpus")), pair / flops, 3 * pair / flops,
        # Weights are gathered twice in bfloat16, gradients scattered in float32.
        8 * part("params"), lambda nodes: part("nvlink") if nodes == 1 else part("fabric"), part("microbatch"),
        12 * part("params"), part("gpu_node_net"),
    )  # fmt: skip


def small() -> Model:
    scale = part("cores") / 2
    forward, training = (part("real_tokens") / part(name) / scale for name in ("cpu_score", "cpu_train"))
    return Model(
        "135M", "cpu", 1, forward, training,
        # All-reduced in float32, by a ring.
        8 * part("small_params"), lambda nodes: math.inf if nodes == 1 else part("node_net"), math.inf,
        12 * part("small_params"), part("node_net"),
    )  # fmt: skip


def shards(rows: float) -> int:
    return max(16, math.ceil(rows * part("row_bytes") / part("part_bytes")))


def token_bytes() -> float:
    """Of a pair with its reference log-probs, before it is compressed: 4 bytes a token, and 4 a token of an answer."""
    answers = 2 * part("pair_tokens") - part("real_tokens")
    return 4 * (part("pair_tokens") + answers)


def over(bytes_: float, nodes: int, each: float) -> float:
    return bytes_ / min(nodes * each, part("store_net"))


def manifests(rows: float) -> float:
    """What a stage costs the driver at its beginning and its end; it lists its pool twice."""
    return shards(rows) * part("take_over") + 2 * math.ceil(shards(rows) / 1000) * part("page")


def by_shard(rows: float, nodes: int, seconds: float, bytes_: float, workers: int, resource: str, net: float) -> Time:
    """A stage in which workers go over shards. seconds: of one worker for a row; bytes_: of a row, read and written."""
    used = min(nodes * workers, shards(rows))
    compute = resource if used == nodes * workers else "few"
    beside = {
        compute: rows * seconds / used,
        "net": over(rows * bytes_, nodes, net),
        "msg": shards(rows) * part("message"),
    }
    return Time(beside, {"drv": manifests(rows)})


def carried(name: str, times_text: float, times_tokens: float) -> Callable[[float, int], Time]:
    """A stage that carries rows. times_text, times_tokens: how often it reads or writes them."""

    def time(rows: float, nodes: int) -> Time:
        bytes_ = times_text * part("row_bytes") + times_tokens * token_bytes()
        return by_shard(rows, nodes, 1 / part(name), bytes_, int(part("cores")), "cpu", part("node_net"))

    return time


def duplicates(rows: float, nodes: int) -> Time:
    """Ids by groups of shards, then prompts by buckets, each of at most 4 million rows."""
    pieces = math.ceil(rows / 4e6)
    used = min(nodes * part("cores"), pieces)
    compute = "cpu" if used == nodes * part("cores") else "few"
    beside = {
        compute: rows * (part("ids") + part("bucket")) / used,
        "req": 3 * pieces**2 / part("store_gets"),  # of each file of ids a bucket reads footer, groups and names
        "net": over(rows * 37 * 2, nodes, part("node_net")),
    }
    alone = part("left_out_share") * rows * part("sort_left_out") + 2 * pieces * part("take_over")
    return Time(beside, {"drv": alone})


def reference(model: Model) -> Callable[[float, int], Time]:
    return lambda rows, nodes: by_shard(
        rows, nodes, model.forward, 2 * token_bytes(), model.workers, model.resource, model.net
    )


def train(model: Model) -> Callable[[float, int], Time]:
    """One epoch: seconds of a step, times the steps."""

    def time(rows: float, nodes: int) -> Time:
        batch, every = part("batch"), part("checkpoint_steps")
        steps = rows / batch
        workers = min(nodes * model.workers, int(batch))
        used = max(1, workers // model.workers)
        pairs = batch / workers
        microbatches = math.ceil(pairs * part("pair_tokens") / model.microbatch) if model.microbatch < math.inf else 1
        compute = model.resource if workers == nodes * model.workers else "batch"
        beside = {
            compute: pairs * model.training * part("imbalance"),
            "grad": microbatches * model.step_bytes / model.link(used),
            "feed": workers * part("block") / part("steps_per_group"),
            "pack": batch / part("pack"),
            "net": over(batch * token_bytes(), used, model.net),
            "ckpt": over(model.state_bytes, used, model.net) / every,
        }
        alone = {
            "hist": steps / 2 * part("history") / every,
            "ckpt": model.state_bytes / (used * part("disk")) / every,
            "drv": rows * part("index") / steps,
        }
        beside_all = {name: steps * seconds for name, seconds in beside.items()}
        return Time(beside_all, {name: steps * seconds for name, seconds in alone.items()})

    return time


def evaluate(model: Model) -> Callable[[float, int], Time]:
    """The pairs that are drawn, out of all shards."""

    def time(rows: float, nodes: int) -> Time:
        drawn = min(part("eval_pairs"), 0.1 * rows)
        workers = min(nodes * model.workers, shards(rows))
        beside = {
            model.resource if workers == nodes * model.workers else "few": drawn * model.forward / workers,
            "net": over(rows * token_bytes(), nodes, model.net),
            "msg": shards(rows) * part("message"),
        }
        return Time(beside, {"drv": manifests(rows)})

    return time


def publish(rows: float, _nodes: int) -> Time:
    """The ids of all rows, of the pairs and of what was trained on, by the driver."""
    return Time({"drv": 2 * rows * part("keep_id")}, {})


def stages() -> dict[str, Callable[[float, int], Time]]:
    """In their order; name → its time by rows and nodes."""
    found: dict[str, Callable[[float, int], Time]] = {
        "ingest": carried("ingest", 3, 0),  # a file is hashed, read, and written as pairs
        "duplicates": duplicates,
        "tokenize": carried("tokenize", 1, 1),
        "data report": carried("report", 1, 2),
    }
    for model in (large(), small()):
        found |= {
            f"reference of {model.name}": reference(model),
            f"train {model.name}": train(model),
            f"evaluate {model.name}": evaluate(model),
        }
    return {**found, "publish": publish}


def tables() -> str:
    """All of them."""
    return "\n\n".join([parts_table(), *(times_table(rows) for rows in SIZES), sizes_table(), files_table()])


def parts_table() -> str:
    rows = [[p.what, p.told, p.source if p.quote else f"assumed: {p.source}"] for p in PARTS.values()]
    return f"### Parts\n\n{table(['what', '', 'measured in, or assumed'], rows)}"


def times_table(rows: int) -> str:
    made = []
    for name, time in stages().items():
        cells = []
        for nodes in NODES:
            found = time(rows, nodes)
            cells.append(f"{short(rows / found.seconds)}/s, {hours(found.seconds)}, {found.first}")
        made.append([name, *cells])
    head = ["stage", *(f"{n} node{'s' if n > 1 else ''}" for n in NODES)]
    return f"### {rows:,} pairs\n\n{table(head, made)}"


def sizes_table() -> str:
    """What one process or one place holds."""
    made = []
    for rows in SIZES:
        count, steps = shards(rows), rows / part("batch")
        made.append(
            [
                f"{rows:,}",
                f"{count:,}",
                f"{count * part('manifest_bytes') / 1e6:.2g} MB",
                f"{5 * count * part('entry_bytes') / 1e6:,.3g} MB",
                gigabytes(rows * part("left_out_bytes")),
                gigabytes(rows * part("index_bytes")),
                f"{steps:,.0f}",
                gigabytes(steps * part("history_bytes")),
                gigabytes(rows * (2 * part("row_bytes") + 2 * token_bytes())),
            ]
        )
    head = [
        "pairs", "shards of a stage", "a manifest", "5 manifests in the driver", "driver, rows left out",
        "index on a node's disk", "steps", "history in rank 0", "the store, before compression",
    ]  # fmt: skip
    return f"### What one process or one place holds\n\n{table(head, made)}"


def files_table() -> str:
    """What the driver has to do with a stage over a billion pairs, by the size of the files that they come in."""
    made = []
    for size in (16, 128, 1024):
        count = max(1, round(SIZES[-1] * part("row_bytes") / (size * _MIB))) * _PARTS_OF_FILE
        messages, ends = count * part("message"), count * part("take_over") + 2 * count / 1000 * part("page")
        made.append(
            [
                f"{size} MiB",
                f"{size // _PARTS_OF_FILE} MiB",
                f"{count:,}",
                hours(messages),
                hours(ends),
                f"{count * part('manifest_bytes') / 1e6:,.3g} MB",
                gigabytes(5 * count * part("entry_bytes")),
            ]
        )
    head = [
        "files",
        "a shard",
        "shards",
        "messages",
        "its beginning and end",
        "a manifest",
        "5 manifests in the driver",
    ]
    return f"### A billion pairs in smaller files\n\n{table(head, made)}"


def short(number: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def hours(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s"
    if seconds < 3600:
        return f"{seconds / 60:.2g} min"
    if seconds < 72 * 3600:
        return f"{seconds / 3600:.2g} h"
    return f"{seconds / 86400:,.0f} d"


def gigabytes(number: float) -> str:
    return f"{number / 1e9:,.2f} GB" if number < 1e11 else f"{number / 1e9:,.0f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/scaling.md")
    options = parser.parse_args()
    print(tables())
    if options.write:
        before, _, rest = REPORT.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        REPORT.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}")


if __name__ == "__main__":
    main()
