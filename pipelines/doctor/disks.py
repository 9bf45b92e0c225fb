"""Room on disks: for what a run writes, for what Ray spills, for copies of models."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from dpo_ray.config import Config
from dpo_ray.machine import Disk
from dpo_ray.model.cache import cache_folder
from dpo_ray.storage.location import Location
from pipelines.doctor.lines import Found

Needed = Mapping[str, tuple[int, str]]
"""What a folder is for → bytes that a run will put there, and what these are."""

_GIB = 2**30
_RAY_IS_FULL = 0.95  # of a disk: Ray spills nothing there any more (local_fs_capacity_threshold)
_ALMOST_FULL = 0.9
_OUTPUT, _SESSION, _CACHE = "run.output", "Ray's temporary folder", "the cache of models"


def folders(output: Location, session: str) -> dict[str, str]:
    """What a folder is for → the folder.

    Args:
        session: Ray's.
    """
    folders = {_OUTPUT: output.uri} if output.is_local else {}
    return {**folders, _SESSION: session, _CACHE: str(cache_folder())}


def room_on(what: str, disk: Disk, needs: Needed, where: str) -> Iterator[Found]:
    """Whether a disk has what a run needs of it.

    Args:
        where: a node's name with a colon, or nothing.
    """
    if not disk.total:  # as some file systems in user space have it
        yield "warning", f"{where}{what}, {disk.folder}: its file system does not tell how much room it has"
        return
    full = 1 - disk.free / disk.total
    needed, for_what = needs.get(what, (0, ""))
    said = f"{where}{what}, {disk.folder}: {disk.free / _GIB:.1f} of {disk.total / _GIB:.1f} GiB are free"
    about = f", and {for_what} take about {needed / _GIB:.1f} GiB" if needed else ""
    way_out = {
        _OUTPUT: "Name another run.output, keep fewer checkpoints (train.keep_checkpoints), or make room: "
        "`dpo-ray gc` on it lists what nothing needs any more.",
        _SESSION: "Make room there, or give Ray another disk (RAY_TMPDIR, or `ray start --temp-dir`).",
        _CACHE: "Make room there, or name a larger disk by DPO_RAY_CACHE.",
    }[what]
    if disk.free < needed:
        yield "failed", f"{said}{about}. {way_out}"
    elif what == _SESSION and full >= _RAY_IS_FULL:
        yield (
            "failed",
            f"{said}: it is {full:.0%} full, and from {_RAY_IS_FULL:.0%} on Ray spills no objects and work stops. "
            f"{way_out}",
        )
    elif disk.free < 2 * needed or full >= _ALMOST_FULL:
        yield "warning", f"{said}{about}: it is {full:.0%} full. {way_out}"
    else:
        yield "ok", f"{said}{about}"


def needed(config: Config) -> Needed:
    """By the model's shape; no weights are loaded. Raises ConfigError where there is no model."""
    # Not above: with torch, which other looks do without.
    from dpo_ray.model.resolve import ModelFolder
    from dpo_ray.training.memory import checkpoint_bytes, shape_of, trained_parameters

    folder = ModelFolder.of(config.model)
    whole = 4 * shape_of(folder).parameters
    lora = config.model.lora
    trained = trained_parameters(folder, lora)
    kept = (config.train.keep_checkpoints + 1) * checkpoint_bytes(trained, config.train)
    exported = 4 * trained if lora is not None and lora.export == "adapter" else whole
    needed = {_OUTPUT: (kept + 2 * exported, f"{config.train.keep_checkpoints} checkpoints, one more, and the model")}
    if "://" in config.model.path:
        needed[_CACHE] = (whole, "the model's files, in float32 at most,")
    return needed


def session_folder() -> str:
    """Where Ray puts what a Ray of this machine's own spills and logs."""
    return f"{os.environ.get('RAY_TMPDIR') or os.environ.get('TMPDIR') or '/tmp'}/ray"
