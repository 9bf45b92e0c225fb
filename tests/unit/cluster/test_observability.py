"""The dashboard and the alerts ask for metrics that there are, and each alert fires when it should."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from dpo_ray.on_ray.metrics import MEASURES
from tests.prometheus import ALERTS, OBSERVABILITY, dashboard, panels, program, rules, selectors, shown
from tests.unit.cluster.manifests import KUBERNETES, MANIFESTS, build, mistakes, objects, the

OURS = {measure.exported: measure for measure in MEASURES}
EXPRESSIONS = {**shown(), **{rule["alert"]: rule["expr"] for rule in rules()}}
CASES = Path(__file__).parent / "alerts_test.yaml"
GIVEN_BY_GRAFANA = {"$run", "$__rate_interval"}


def name_of(selector: str) -> str:
    return selector.partition("{")[0]


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_asks_for_metrics_and_labels_that_there_are(name: str):
    asked = selectors(EXPRESSIONS[name])
    assert asked
    labels = set()
    for selector in asked:
        if (metric := name_of(selector)) in OURS:
            of_metric = {"run", "stage", *OURS[metric].labels}
            assert set(re.findall(r"(\w+)=", selector)) <= of_metric, selector
            labels |= of_metric
        else:
            assert not metric.startswith("ray_dpo_ray_"), metric
            labels |= {"instance", "Name", "GpuIndex", "job", "SessionName"}
    grouped = {label for by in re.findall(r"by \(([^)]*)\)", EXPRESSIONS[name]) for label in by.split(", ")}
    assert grouped <= labels


def test_every_metric_of_ours_is_on_the_dashboard():
    on_it = {name_of(selector) for expression in shown().values() for selector in selectors(expression)}
    assert {name for name in on_it if name.startswith("ray_dpo_ray_")} == set(OURS)


def test_metrics_of_rays_own_are_those_that_ray_tells():
    import ray
    import ray.dashboard.modules.metrics.dashboards.default_dashboard_panels as rays_panels
    import ray.dashboard.modules.reporter.reporter_agent as reporter

    told = Path(rays_panels.__file__).read_text() + Path(reporter.__file__).read_text()
    asked = {name_of(s) for expression in EXPRESSIONS.values() for s in selectors(expression)} - set(OURS) - {"up"}
    assert len(asked) > 4
    head = (Path(ray.__file__).parent / "core" / "src" / "ray" / "gcs" / "gcs_server").read_bytes()
    for name in asked:
        own = name.removeprefix("ray_")
        assert re.search(rf"\b{name}\b|\"{own}\"", told) or f"\0{own}\0".encode() in head, name


def test_panels_say_what_they_show_and_do_not_overlap():
    found = dashboard()["panels"]
    assert len({panel["id"] for panel in found}) == len(found)
    taken: set[tuple[int, int]] = set()
    for panel in found:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["title"] and panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
        variables = {v for target in panel["targets"] for v in re.findall(r"\$\w+", target["expr"])}
        assert variables <= GIVEN_BY_GRAFANA
        for target in panel["targets"]:
            labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert labels <= set(re.findall(r"\w+", target["expr"].partition("by (")[2].partition(")")[0]))
    names = {variable["name"] for variable in dashboard()["templating"]["list"]}
    assert names == {"run", "datasource", "ray_dashboard"}
    assert "${ray_dashboard}" in dashboard()["links"][0]["url"]


def test_alerts_say_what_happened_and_what_to_do():
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) >= 10
    for rule in rules():
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert len(rule["annotations"]["summary"]) > 20 and len(rule["annotations"]["description"]) > 80
        used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        kept = re.findall(r"^\S.*?by \(([^)]*)\)", rule["expr"], re.S)
        assert used <= (set(kept[0].split(", ")) if kept else {"instance", "job"}), rule["alert"]


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_is_silent():
    cases = yaml.safe_load(CASES.read_text())["tests"]
    firing, series = set(), " ".join(one["series"] for one in cases[0]["input_series"])
    for case in cases:
        for asked in case["promql_expr_test"]:
            for sample in asked["exp_samples"]:
                firing |= set(re.findall(r'alertname="(\w+)", alertstate="firing"', sample["labels"]))
    assert firing == {rule["alert"] for rule in rules()}
    # The first case has all that the alerts look at, and none of them fires.
    assert all(not asked["exp_samples"] for asked in cases[0]["promql_expr_test"])
    for rule in rules():
        assert all(name_of(selector) in series for selector in selectors(rule["expr"])), rule["alert"]


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [program("promtool"), *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)


def test_the_alerts_fire_and_are_silent_as_the_cases_say():
    done = promtool("test", "rules", CASES)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("> 1800", "> 18000"),
        (" offset 1h\n            or ", " offset 1h\n            and "),
        ("> 0.2", "> 0.1"),
        ("0.5 *", "0.1 *"),
    ],
)
def test_a_mistake_in_an_alert_is_found(right: str, wrong: str, tmp_path: Path):
    assert right in ALERTS.read_text()
    (tmp_path / "alerts.yaml").write_text(ALERTS.read_text().replace(right, wrong))
    cases = yaml.safe_load(CASES.read_text()) | {"rule_files": ["alerts.yaml"]}
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump(cases))
    assert promtool("test", "rules", tmp_path / "cases.yaml").returncode != 0


def test_prometheus_takes_its_configuration():
    done = promtool("check", "config", OBSERVABILITY / "prometheus.yaml")
    assert done.returncode == 0 and f"{len(rules())} rules found" in done.stdout, done.stdout


def test_the_operator_looks_at_the_ports_and_pods_that_there_are():
    monitor = the("PodMonitor", objects((OBSERVABILITY / "pod_monitor.yaml").read_text()))
    policy = the("NetworkPolicy", objects((OBSERVABILITY / "network.yaml").read_text()))
    assert mistakes(policy) == []
    cluster = the("RayJob", objects((KUBERNETES / "base" / "rayjob.yaml").read_text()))["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    head = {port["name"]: port["containerPort"] for port in groups[0]["template"]["spec"]["containers"][0]["ports"]}
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert policy["spec"]["ingress"][0]["ports"] == [{"port": head[endpoint["port"]], "protocol": "TCP"}]
    # KubeRay adds this label to the pods that are Ray's nodes, and the port to those that do not name it.
    wanted = dict(monitor["spec"]["selector"]["matchLabels"])
    assert wanted.pop("ray.io/is-ray-node") == "yes"
    assert wanted == policy["spec"]["podSelector"]["matchLabels"]
    for group in groups:
        assert wanted.items() <= group["template"]["metadata"]["labels"].items()
    job = yaml.safe_load((OBSERVABILITY / "prometheus.yaml").read_text())["scrape_configs"][0]["job_name"]
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": job}]


def test_the_overlay_is_built():
    found = build(OBSERVABILITY)
    assert {one["kind"] for one in found} == {"PodMonitor", "NetworkPolicy", "ConfigMap"}
    assert {one["metadata"]["namespace"] for one in found} == {"dpo-ray"}
    config = the("ConfigMap", found)
    assert config["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert config["data"] == {"dashboard.json": (OBSERVABILITY / "dashboard.json").read_text()}


def test_the_page_names_every_alert():
    page = (MANIFESTS / "README.md").read_text()
    assert set(re.findall(r"`(DpoRay\w+)`", page)) == {rule["alert"] for rule in rules()}
