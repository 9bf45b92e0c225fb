"""What the model was made of, from the data and the first model to what was published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from dpo_ray.config import Config
from dpo_ray.report.document import Graph, Node, Paragraph, Section
from dpo_ray.report.facts import Facts

_CHAIN = (
    ("pairs", ("ingest", "pair"), "pairs"),
    ("tokens", ("tokenize",), "token ids"),
    ("reference", ("reference",), "reference log-probs"),
)


def lineage_section(facts: Facts) -> Section | None:
    """None where no stage was done."""
    if not facts.summary["stages"]:
        return None
    graph = _Made(facts)
    graph.given()
    if facts.summary.get("rounds"):
        graph.rounds()
    else:
        graph.prepared()
        graph.trained()
    said = "What each was made of. A stage that was taken over was finished before this run; nothing of it is repeated."
    return Section("lineage", "Lineage", [Paragraph(said), Graph(graph.nodes, graph.arrows)])


class _Made:
    """Collects nodes and arrows, downstream."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.nodes: list[Node] = []
        self.arrows: list[tuple[str, str]] = []
        self.rows = "data"
        """The newest node that is trained on."""

    def add(self, node: Node, *made_of: str) -> None:
        self.nodes.append(node)
        known = {one.name for one in self.nodes}
        self.arrows += [(name, node.name) for name in dict.fromkeys(made_of) if name in known and name != node.name]

    def given(self) -> None:
        config = self.facts.config
        label, note = _source(config, self.facts.summary)
        self.add(Node("data", label, note, "given"))
        self.add(Node("model", "model", _short(config.model.path), "given"))

    def prepared(self) -> None:
        for name, stages, label in _CHAIN:
            entry = next((found for stage in stages if (found := self.facts.stage(stage)) is not None), None)
            if entry is None:
                continue
            sampled = name == "pairs" and self.facts.config.generate is not None
            self.add(Node(name, label, _told(entry)), self.rows, *(["model"] if sampled or name == "reference" else []))
            self.rows = name

    def trained(self) -> None:
        summary, entry = self.facts.summary, self.facts.stage("train")
        sweep = summary.get("sweep")
        if sweep:
            trials = ", ".join(f"{count} {state}" for state, count in sweep["trials"].items())
            self.add(Node("trials", "trials", trials), self.rows, "model")
        if entry is None:
            return
        start = (summary.get("train") or {}).get("started_from")
        begins = "model"
        if start and start != self.facts.config.model.path:
            begins = "start"
            self.add(Node("start", "published before", _short(start), "given"))
        of = ("trials",) if sweep else (self.rows, begins)
        label = f"trial {sweep['best']['number']}, the best" if sweep and "best" in sweep else "policy"
        self.add(Node("policy", label, _told(entry)), *of)
        self.ended("policy")

    def rounds(self) -> None:
        before = "model"
        for one in self.facts.summary["rounds"]:
            name = f"round {one['round']}"
            note = f"{one['pairs']:,} pairs, win rate {one['win_rate']['value']:.3f}"
            self.add(Node(name, f"{name}{', the best' if one['best'] else ''}", note), before, "data")
            before = name
        best = next(f"round {one['round']}" for one in self.facts.summary["rounds"] if one["best"])
        self.ended(best)

    def ended(self, policy: str) -> None:
        published = self.facts.summary.get("published")
        if self.facts.evaluation:
            n = (self.facts.evaluation.get("accuracy") or self.facts.evaluation.get("win_rate") or {}).get("n")
            self.add(Node("measured", "measured", f"on {n:,} held out" if n else ""), policy)
            policy = "measured"
        if published:
            self.add(Node("published", "published", _short(published), "end"), policy)
        elif self.facts.summary["exit_code"] == 4:
            self.add(Node("published", "not published", "the gate does not hold", "end"), policy)


def _source(config: Config, summary: Mapping[str, Any]) -> tuple[str, str]:
    if config.generate is not None:
        return "prompts", _short(config.generate.prompts)
    if config.data.sources:
        return "data", ", ".join(source.name for source in config.data.sources)
    train = config.data.train
    paths = [train] if isinstance(train, str) else [str(path) for path in train or ()]
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return "data", f"{_short(paths[0])}{more}" if paths else ""


def _short(path: str) -> str:
    return PurePath(path).name or path


def _told(entry: Mapping[str, Any]) -> str:
    kept = entry["rows"]["kept"]
    rows = f"{kept:,} rows, " if kept is not None else ""
    return f"{rows}{'taken over' if entry['reused'] else 'made'}"
