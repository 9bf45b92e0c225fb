"""What can go wrong, as the person who must mend it sees it.

Every error is one paragraph that names the value, the limit and the way out, and carries the exit code of
the command line:

    DpoRayError                 1   something unexpected
    ├── NonFiniteLoss           1   training met NaN or infinity more often than allowed
    ├── StorageError            1   an object store refused, or did not answer
    ├── EndpointError           1   a judge's server refused, or did not answer
    ├── ConfigError             2   configuration or usage
    │   └── RewardError         2   the reward function that is named there fails, or gives no number
    ├── DataError               3   data unreadable, or too much of it quarantined
    │   ├── PairTooLong         3   a pair that does not fit into the memory of a training worker
    │   └── DamagedCheckpoint   3   a checkpoint whose bytes are not those that were written
    ├── ReferenceMismatch       3   reference log-probs and the trainer's forward disagree
    ├── GateFailed              4   the model did not pass its gate; nothing was published
    ├── LeaseLost               1   another run has taken over what this one, too long without a sign, was at
    ├── Busy                   75   another run is at it, and this one was to leave (sysexits.h: try again later)
    ├── Interrupted           130   by Ctrl-C
    └── Terminated            143   by SIGTERM: Kubernetes, Slurm or a shutdown ended it

Errors cross process borders (Ray pickles them), so each is built from one message alone.
"""


class DpoRayError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 1


class ConfigError(DpoRayError, ValueError):
    """A configuration value, or a combination of values, that cannot work."""

    exit_code = 2


class RewardError(ConfigError):
    """A reward function that raises, or gives something else than a finite number."""


class DataError(DpoRayError):
    """Input that cannot be read, or too much of it unusable."""

    exit_code = 3


class PairTooLong(DataError):
    """A pair that a training worker has too little memory for."""


class DamagedCheckpoint(DataError):
    """A checkpoint that is cut off, or whose bytes are not those that were written."""

    folder: str | None = None
    """Its URI; None: it is the one that was gone on from."""


class ReferenceMismatch(DataError):
    """Reference log-probs that the trainer's own forward does not reproduce within tolerance."""


class NonFiniteLoss(DpoRayError):
    """A loss or gradient that is NaN or infinite."""


class StorageError(DpoRayError, OSError):
    """An object store that cannot be reached or does not do what it is asked for."""


class EndpointError(DpoRayError):
    """A judge's server that cannot be reached, refuses, or does not answer in time."""


class GateFailed(DpoRayError):
    """The evaluated model is not good enough to be published."""

    exit_code = 4


class Interrupted(DpoRayError):
    """The person at the terminal ended it."""

    exit_code = 130  # as a shell has it for SIGINT


class Terminated(DpoRayError):
    """The machine, or what schedules its work, ended it."""

    exit_code = 143  # as a shell has it for SIGTERM


class LeaseLost(DpoRayError):
    """Another run has taken over the work."""


class Busy(DpoRayError):
    """Another run is at the same work, and this one is not to wait for it."""

    exit_code = 75  # EX_TEMPFAIL


class EngineDied(Exception):
    """The engine cannot be used any more: its process must end, and another one go on with the shard."""
