"""What was made of what, as a drawing."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from dpo_ray.report.document import Graph, Node
from dpo_ray.report.graph import drawing, layers
from tests.reports import HOSTILE

NODES = [
    Node("data", "data", HOSTILE, "given"),
    Node("pairs", "pairs"),
    Node("model", "model", kind="given"),
    Node("policy", "policy"),
]
GRAPH = Graph(NODES, [("data", "pairs"), ("pairs", "policy"), ("model", "policy"), ("data", "policy")])


def test_each_stands_below_all_that_it_was_made_of_and_what_is_given_just_above_its_use():
    assert [[node.name for node in row] for row in layers(GRAPH)] == [["data"], ["pairs", "model"], ["policy"]]
    assert layers(Graph([], [])) == []


def test_the_drawing_is_whole_says_what_it_shows_and_lets_no_text_out():
    svg = drawing(GRAPH)
    root = ET.fromstring(svg)
    boxes = [element for element in root.iter() if element.tag == "rect"]
    arrows = [element for element in root.iter() if element.get("class") == "arrow"]
    assert (len(boxes), len(arrows)) == (4, 4)
    assert "data to pairs; pairs to policy" in root.attrib["aria-label"] and root.attrib["role"] == "img"
    width, height = (float(number) for number in root.attrib["viewBox"].split()[2:])
    for box in boxes:
        x, y, wide, high = (float(box.attrib[name]) for name in ("x", "y", "width", "height"))
        assert x >= 0 and x + wide <= width and y >= 0 and y + high <= height
    assert not [element for element in root.iter() if element.tag in {"img", "script"}]
