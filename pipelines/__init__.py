"""The stages, the main job and the command line."""

from typing import Literal, get_args

Stage = Literal["ingest", "generate", "tokenize", "reference", "train", "evaluate", "publish"]
"""What the command line can run up to; ingest or generate comes first, by the configuration."""
STAGES: tuple[Stage, ...] = get_args(Stage)
