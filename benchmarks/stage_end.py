"""What a stage's end costs on an object store: from its last shard written to its manifest, and again a night later.

    python -m benchmarks.stage_end [--before <another checkout>] [--shards 2000] [--write]

makes a stage of many small shards in moto's S3 on this machine, in a process for each checkout. Its workers are
stand-ins: threads that write shards of 20 rows. Then comes the stage of the next night, over 1% more shards. Counted
are the seconds and the requests that are not the workers' own, and the bytes that were copied. What a request takes
here is the server's CPU time, so the requests are what tells.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_BUCKET = "bucket"
_WRITERS = 8
_REQUEST = re.compile(r'"(?:GET|PUT|HEAD|POST|DELETE) /')


@contextmanager
def store(log: Path) -> Iterator[str]:
    """The address of an empty S3 whose requests are lines of a log."""
    with log.open("w") as out:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            if process.poll() is not None:
                sys.exit(f"moto's server ended:\n{log.read_text()}")
            time.sleep(0.1)
        yield found[0]
    finally:
        process.terminate()
        process.wait()


class Meter:
    """Seconds and requests, but for those of the workers."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self.requests = -self._count()
        self.seconds = -time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.seconds += time.monotonic()
        self.requests += self._count()
        yield
        self.requests -= self._count()
        self.seconds -= time.monotonic()

    def read(self) -> dict[str, float]:
        return {"seconds": self.seconds + time.monotonic(), "requests": self.requests + self._count()}

    def _count(self) -> int:
        time.sleep(0.2)  # a line is written after its response
        return len(_REQUEST.findall(self._log.read_text()))


def side(log: Path, shards: int) -> dict[str, Any]:
    """The measurements, with the dpo_ray that is found first on the path."""
    import boto3
    import pyarrow as pa

    from dpo_ray.on_ray import pool
    from dpo_ray.on_ray.pool import Pool, ShardTask, ShardWorker, shard_stage
    from dpo_ray.shards.output import ShardOutput
    from dpo_ray.storage.location import Location

    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).create_bucket(Bucket=_BUCKET)
    output = Location.of(f"s3://{_BUCKET}/out")
    meters: dict[str, Meter] = {}
    copied: list[Location] = []

    class Rows:
        def __call__(self, source: int) -> ShardOutput:
            return ShardOutput(pa.table({"x": list(range(source, source + 20))}), Counter(read=20))

    def compute(kind: str, location: Location, missing: list[tuple[str, Any]], workers: Pool, unit: str) -> Any:
        worker: Any = ShardWorker(location, workers.build, workers.arguments)
        write = worker.do if hasattr(worker, "do") else worker._do
        with meters["whole"].paused(), ThreadPoolExecutor(_WRITERS) as threads:
            made = list(threads.map(lambda one: write(one[0], one[1].source), missing))
        meters["end"] = Meter(log)
        return dict(zip((name for name, _ in missing), made, strict=True))

    def copy_to(place: Location, target: Location, copy: Callable[..., None] = Location.copy_to) -> None:
        copied.append(place)
        copy(place, target)

    pool._compute = compute
    Location.copy_to = copy_to  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    for night, number in (("first", shards), ("second", shards + shards // 100)):
        tasks = [ShardTask(source=n, content=str(n), rows=20) for n in range(number)]
        meters["whole"] = Meter(log)
        made, _ = shard_stage(output, "made", identity={}, inputs={"n": str(number)}, tasks=tasks, pool=Pool(Rows, {}))
        found[night] = {name: meter.read() for name, meter in meters.items()}
        found[night] |= {"shards": number, "copied": sum(place.size() for place in copied)}
    found["manifest"] = (made.location / "manifest.json").size()
    return found


def measured(checkout: Path, shards: int) -> dict[str, Any]:
    """The same, of a checkout, in a process and with a store of its own."""
    with tempfile.TemporaryDirectory() as folder, store(Path(folder) / "log") as address:
        env = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        env |= {
            "PYTHONPATH": str(checkout),
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        command = [sys.executable, __file__, "--shards", str(shards), "--side", str(Path(folder) / "log")]
        done = subprocess.run(command, env=env, cwd=checkout, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def rows_of(name: str, found: dict[str, Any]) -> list[list[str]]:
    """Of a side, as the table has them."""
    rows = []
    for night, what, meter in (
        ("first", "last shard → manifest", "end"),
        ("second", "all but the new shards", "whole"),
    ):
        one = found[night]
        seconds, requests = one[meter]["seconds"], one[meter]["requests"]
        of_each = f"{requests / one['shards']:.3f}"
        copied = f"{one['copied'] / 1e6:.2f}"
        rows.append([name, f"{one['shards']} shards, {what}", f"{seconds:.1f}", f"{requests:.0f}", of_each, copied])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, measured first")
    parser.add_argument("--shards", type=int, default=2000)
    parser.add_argument("--write", action="store_true", help="put the table at the end of benchmarks/stage_end.md")
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        print(json.dumps(side(options.side, options.shards)))
        return
    from benchmarks.record import ROOT, environment, table, versions

    sides = {"before": options.before} if options.before else {}
    rows = []
    sizes = []
    for name, checkout in {**sides, "now": ROOT}.items():
        found = measured(checkout.resolve(), options.shards)
        rows += rows_of(name, found)
        sizes.append(f"{name} {found['manifest'] / 1000:.0f} kB")
    now = environment(("pyarrow", "moto"))
    load = os.getloadavg()[2]
    text = (
        f"\n## {datetime.now(UTC):%Y-%m-%d} (commit {now['commit']})\n\n{now['hardware']}; {versions(now)}. "
        f"Measured once; load {load:.1f} over the last 15 minutes. Second night's manifest: {', '.join(sizes)}.\n\n"
        + table(["side", "stage", "s", "requests", "requests a shard", "MB copied"], rows)
        + "\n"
    )
    print(text)
    if options.write:
        with (ROOT / "benchmarks" / "stage_end.md").open("a") as out:
            out.write(text)


if __name__ == "__main__":
    main()
