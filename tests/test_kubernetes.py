"""The overlays of kubernetes/: objects fit their schemas, arguments their programs' parsers, and all fit each other."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer.main
import yaml
from kubernetes.utils.quantity import parse_quantity
from kustomization import Object, render
from vllm_router.launch_router import parse_router_args

from servebook.ways.fastapi_gateway.server.__main__ import main as gateway
from servebook.ways.watch_it import prometheus
from servebook.ways.watch_it.alarm import RULES

ROOT = Path(__file__).parents[1]
OVERLAYS = {path.name: path for path in sorted((ROOT / "kubernetes/overlays").iterdir())}
README = (ROOT / "kubernetes/README.md").read_text()
KUBERNETES = "1.33"
OPERATORS = {"ScaledObject", "PodMonitor", "PrometheusRule", "HTTPRoute"}
"""Kinds that KEDA, Prometheus' operator and the Gateway API add: Kubernetes itself has no schema of them."""
ASK_FOR_TOKENS = {"cache_aware", "kv_aware"}
"""The router's policies that call `/v1/completions/render` of a replica (chapter 10, section 4)."""
UVICORN_SECONDS = 5
"""What the gateway gives to that which is running when SIGTERM comes."""

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@cache
def objects(overlay: str) -> dict[tuple[str, str], Object]:
    """Every object of an overlay, by kind and name."""
    return {(each["kind"], each["metadata"]["name"]): each for each in render(OVERLAYS[overlay])}


def of_kind(overlay: str, kind: str) -> dict[str, Object]:
    return {name: each for (one, name), each in objects(overlay).items() if one == kind}


def pod(overlay: str, name: str) -> Object:
    return dict(objects(overlay)["Deployment", name]["spec"]["template"]["spec"])


def container(overlay: str, name: str) -> Object:
    (one,) = pod(overlay, name)["containers"]
    return dict(one)


def labels(overlay: str) -> list[Object]:
    """Of the pods of every Deployment."""
    return [each["spec"]["template"]["metadata"]["labels"] for each in of_kind(overlay, "Deployment").values()]


def find(tree: Any, key: str) -> Iterator[Any]:
    """What stands under `key`, anywhere in `tree`."""
    if isinstance(tree, dict):
        yield from (value for name, value in tree.items() if name == key)
    if isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from find(value, key)


@cache
def vllm(overlay: str) -> Any:
    """The arguments of `vllm serve`, as its own parser reads them."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    one = container(overlay, "vllm")
    assert one["command"][:2] == ["vllm", "serve"]
    return make_arg_parser(FlexibleArgumentParser()).parse_args([*one["command"][2:], *one["args"]])


def router(overlay: str) -> Any:
    namespace = objects(overlay)["Deployment", "vllm-router"]["metadata"]["namespace"]
    words = [word.replace("$(NAMESPACE)", namespace) for word in container(overlay, "vllm-router")["args"]]
    return parse_router_args(words)


def drain(overlay: str, name: str) -> tuple[int, int]:
    """Of a Deployment's pods: the seconds that they have to leave, and those that they sleep first."""
    sleep = container(overlay, name)["lifecycle"]["preStop"]["sleep"]["seconds"]
    return pod(overlay, name)["terminationGracePeriodSeconds"], sleep


# Each by itself


@each_overlay
def test_objects_fit_the_schemas(overlay: str) -> None:
    for (kind, _), each in objects(overlay).items():
        if kind not in OPERATORS:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)
    assert {kind for kind, _ in objects(overlay)} >= {"Deployment", "PodDisruptionBudget", "NetworkPolicy"}


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("replicas: 2", "replicas: two", "'two' is not of type"),
        ("httpGet: {path: /health", "httpGet: {paht: /health", "'paht' was unexpected"),
        ("enableServiceLinks", "enableServiceLink", "'enableServiceLink' was unexpected"),
    ],
)
def test_the_schemas_find_mistakes(right: str, wrong: str, problem: str) -> None:
    text = (ROOT / "kubernetes/base/vllm.yaml").read_text()
    assert right in text
    broken, _ = yaml.safe_load_all(text.replace(right, wrong))
    with pytest.raises(kubernetes_validate.ValidationError, match=problem):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


@each_overlay
def test_the_overlays_are_rendered_here_as_kustomize_renders_them(overlay: str) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl, which has kustomize in it, is not installed")
    command = ["kubectl", "kustomize", str(OVERLAYS[overlay])]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    theirs = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(text)}
    for each in theirs.values():
        if each["kind"] == "Secret":
            each["stringData"] = {name: base64.b64decode(value).decode() for name, value in each.pop("data").items()}
            del each["type"]
    assert {key: in_order(each) for key, each in theirs.items()} == {
        key: in_order(each) for key, each in objects(overlay).items()
    }


def in_order(tree: Any) -> Any:
    """`tree` with its lists of named things in the order of the names, which has no meaning."""
    if isinstance(tree, dict):
        return {key: in_order(value) for key, value in tree.items()}
    if isinstance(tree, list):
        done = [in_order(value) for value in tree]
        return sorted(done, key=lambda each: each["name"]) if all("name" in each for each in done) else done
    return tree


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("name: models}", "name: model}", "a patch for PersistentVolumeClaim model meets 0 objects"),
        ("/spec/accessModes", "/spec/accessMode", "wants to replace /spec/accessMode, which is not there"),
        ("generatorOptions", "generatorOption", "not understood: generatorOption"),
    ],
)
def test_a_patch_of_what_is_not_there_is_found(tmp_path: Path, right: str, wrong: str, problem: str) -> None:
    shutil.copytree(ROOT / "kubernetes", tmp_path / "kubernetes")
    file = tmp_path / "kubernetes/overlays/cpu-kind/kustomization.yaml"
    assert right in file.read_text()
    file.write_text(file.read_text().replace(right, wrong))
    with pytest.raises(ValueError, match=problem):
        render(file.parent)


@each_overlay
def test_the_programs_understand_their_arguments(overlay: str) -> None:
    command = typer.main.get_command(typer_of(gateway))
    words = container(overlay, "gateway")["args"]
    assert command.make_context("gateway", list(words)).params["upstream"] == "http://vllm-router"
    assert vllm(overlay).host == router(overlay).host == router(overlay).prometheus_host == "0.0.0.0"  # all of the pod
    assert container(overlay, "vllm")["command"][2].startswith("/models/")


def typer_of(function: Any) -> typer.Typer:
    app = typer.Typer()
    app.command()(function)
    return app


# All together


@each_overlay
def test_ports_meet(overlay: str) -> None:
    def ports(name: str) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in container(overlay, name)["ports"]}

    assert ports("vllm") == {"http": vllm(overlay).port} == {"http": router(overlay).service_discovery_port}
    assert ports("vllm-router") == {"http": router(overlay).port, "metrics": router(overlay).prometheus_port}
    assert f"--http-port={ports('gateway')['http']}" in container(overlay, "gateway")["args"]
    for name, service in of_kind(overlay, "Service").items():
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports(name).keys()
    for name in of_kind(overlay, "Deployment"):
        probes = [container(overlay, name)[kind] for kind in ("readinessProbe", "livenessProbe")]
        assert {probe["httpGet"]["port"] for probe in probes} == {"http"}
    for policy in of_kind(overlay, "NetworkPolicy").values():
        for rule in policy["spec"].get("ingress", ()):
            guarded = policy["spec"]["podSelector"]["matchLabels"]["app"]
            assert {port["port"] for port in rule["ports"]} <= ports(guarded).keys()
    upstream = re.search(r"--upstream=http://([\w-]+)", " ".join(container(overlay, "gateway")["args"]))
    assert upstream
    assert 80 in [port["port"] for port in of_kind(overlay, "Service")[upstream[1]]["spec"]["ports"]]


@each_overlay
def test_whatever_is_selected_is_there(overlay: str) -> None:
    selectors = [each for each in find(list(objects(overlay).values()), "matchLabels") if "app" in each]
    selectors += [service["spec"]["selector"] for service in of_kind(overlay, "Service").values()]
    selectors.append(router(overlay).selector)
    assert len(selectors) > 8
    for selector in selectors:
        assert any(selector.items() <= each.items() for each in labels(overlay)), selector
    for deployment in of_kind(overlay, "Deployment").values():
        spec = deployment["spec"]
        assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]


@each_overlay
def test_what_a_pod_names_is_there(overlay: str) -> None:
    """Secrets and their keys, claims and accounts; what the reader brings is in the README."""
    made = {name: each["stringData"] for name, each in of_kind(overlay, "Secret").items()}
    for reference in find(list(objects(overlay).values()), "secretKeyRef"):
        name, key = reference["name"], reference["key"]
        assert key in made.get(name, {}) or f"create secret generic {name} --from-file={key}=/dev/stdin" in README
    assert set(find(list(objects(overlay).values()), "claimName")) == of_kind(overlay, "PersistentVolumeClaim").keys()
    accounts = set(find(list(of_kind(overlay, "Deployment").values()), "serviceAccountName"))
    assert accounts == of_kind(overlay, "ServiceAccount").keys()


def test_the_key_for_kind_is_one_that_the_gateway_takes_and_no_other_overlay_has_one() -> None:
    assert len(objects("cpu-kind")["Secret", "vllm-api-key"]["stringData"]["key"]) >= 8
    assert not of_kind("gpu", "Secret")


@each_overlay
def test_the_policy_finds_its_routes_on_the_replicas(overlay: str) -> None:
    assert router(overlay).policy in ASK_FOR_TOKENS
    assert vllm(overlay).enable_scale_out
    assert router(overlay).service_discovery


@each_overlay
def test_whatever_is_running_ends_before_its_pod_does(overlay: str) -> None:
    longest = router(overlay).request_timeout_secs
    grace, sleep = drain(overlay, "vllm")
    assert vllm(overlay).shutdown_timeout >= longest
    assert grace > sleep + vllm(overlay).shutdown_timeout
    grace, sleep = drain(overlay, "vllm-router")  # which waits, without a limit of its own
    assert grace > sleep + longest
    grace, sleep = drain(overlay, "gateway")
    assert sleep >= longest
    assert grace > sleep + UVICORN_SECONDS


@each_overlay
def test_no_pod_is_root_or_knows_more_than_it_needs(overlay: str) -> None:
    for name in of_kind(overlay, "Deployment"):
        spec = pod(overlay, name)
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not spec["enableServiceLinks"], name
        assert spec.get("automountServiceAccountToken", name == "vllm-router") == (name == "vllm-router")
        for each in [*spec["containers"], *spec.get("initContainers", ())]:
            inside = each["securityContext"]
            assert not inside["allowPrivilegeEscalation"], each["name"]
            assert inside["capabilities"] == {"drop": ["ALL"]}, each["name"]
            assert "memory" in each["resources"]["limits"], each["name"]


@each_overlay
def test_who_may_call_whom(overlay: str) -> None:
    """Each Deployment has a policy that opens it, after one that closes all; vLLM is behind the router alone."""
    policies = of_kind(overlay, "NetworkPolicy")
    assert policies["closed"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    assert policies.keys() - {"closed"} == of_kind(overlay, "Deployment").keys()
    callers = {
        name: {each["podSelector"]["matchLabels"]["app"] for each in find_from(policy) if "podSelector" in each}
        for name, policy in policies.items()
    }
    assert callers == {"closed": set(), "gateway": set(), "vllm-router": {"gateway"}, "vllm": {"vllm-router"}}


def find_from(policy: Object) -> list[Object]:
    return [each for rule in policy["spec"].get("ingress", ()) for each in rule.get("from", ())]


@each_overlay
def test_a_disruption_never_takes_the_last_copy(overlay: str) -> None:
    for name, budget in of_kind(overlay, "PodDisruptionBudget").items():
        assert budget["spec"]["maxUnavailable"] == 1
        assert budget["spec"]["selector"]["matchLabels"] == {"app": name}
    copies = {name: each["spec"].get("replicas") for name, each in of_kind(overlay, "Deployment").items()}
    assert copies["vllm"] in (2, None)  # None: the autoscaler's minimum
    assert "vllm-router" not in of_kind(overlay, "PodDisruptionBudget")


def test_the_router_may_see_pods_and_nothing_else() -> None:
    (rule,) = objects("gpu")["Role", "vllm-router"]["rules"]
    assert rule == {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    binding = objects("gpu")["RoleBinding", "vllm-router"]
    (account,) = binding["subjects"]
    assert (account["name"], account["namespace"]) == ("vllm-router", binding["metadata"]["namespace"])
    assert ("Role", binding["roleRef"]["name"]) in objects("gpu")


def test_the_autoscaler_reads_a_gauge_that_vllm_has_and_owns_the_number() -> None:
    from vllm.v1.metrics import loggers

    scaler = objects("gpu")["ScaledObject", "vllm"]["spec"]
    assert "replicas" not in objects("gpu")["Deployment", scaler["scaleTargetRef"]["name"]]["spec"]
    assert scaler["minReplicaCount"] == 2
    namespace = objects("gpu")["ScaledObject", "vllm"]["metadata"]["namespace"]
    for trigger in scaler["triggers"]:
        gauges = re.findall(r"(vllm:\w+)(\S*?)\)", trigger["metadata"]["query"])
        assert gauges
        for gauge, where in gauges:
            assert f'name="{gauge}"' in Path(loggers.__file__).read_text()
            assert where == f'{{namespace="{namespace}"}}'


def wished(running: int, waiting: int) -> int:
    """How many replicas the autoscaler wants, as KEDA and the cluster reckon: the most of what the triggers ask for."""
    counts = {"vllm:num_requests_running": running, "vllm:num_requests_waiting": waiting}
    scaler = objects("gpu")["ScaledObject", "vllm"]["spec"]
    asked = [
        math.ceil(sum(counts[gauge] for gauge in re.findall(r"vllm:\w+", each["query"])) / float(each["threshold"]))
        for each in (trigger["metadata"] for trigger in scaler["triggers"])
    ]
    return int(min(max(*asked, scaler["minReplicaCount"]), scaler["maxReplicaCount"]))


def test_an_empty_queue_sends_no_replica_home_that_is_at_work() -> None:
    assert wished(running=0, waiting=0) == 2
    assert wished(running=6 * 16, waiting=0) == 6, "which the queue alone would have set to the fewest"
    assert wished(running=2 * 16, waiting=20) == 5
    assert wished(running=1000, waiting=1000) == 8


def test_the_number_of_replicas_stays_where_prometheus_knows_nothing() -> None:
    """KEDA's scaler for Prometheus takes no answer for a zero unless it is told otherwise."""
    for trigger in objects("gpu")["ScaledObject", "vllm"]["spec"]["triggers"]:
        assert trigger["metadata"]["ignoreNullValues"] == "false"


def test_prometheus_reads_every_deployment_where_it_may_and_calls_it_as_the_chapter_does() -> None:
    monitors = of_kind("gpu", "PodMonitor")
    assert monitors.keys() == of_kind("gpu", "Deployment").keys()
    for name, monitor in monitors.items():
        assert monitor["spec"]["jobLabel"] == "app"
        assert monitor["spec"]["selector"]["matchLabels"] == {"app": name}
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["port"] in [port["name"] for port in container("gpu", name)["ports"]]
        opened = objects("gpu")["NetworkPolicy", name]["spec"]["ingress"]
        callers = [
            each for rule in opened if {"port": endpoint["port"]} in rule["ports"] for each in rule.get("from", ())
        ]
        everybody = any("from" not in rule for rule in opened)
        assert everybody or any("namespaceSelector" in each for each in callers), name
    jobs = {job["job_name"] for job in yaml.safe_load(prometheus.CONFIG.read_text())["scrape_configs"]}
    assert jobs - {"grpc"} <= monitors.keys()


def test_the_alarms_are_the_chapters_for_this_namespace() -> None:
    rule = objects("gpu")["PrometheusRule", "servebook"]
    here = f'namespace="{rule["metadata"]["namespace"]}"'
    (group,) = rule["spec"]["groups"]
    for each in group["rules"]:
        read = re.findall(r"(?:\bup\b|\bvllm:\w+|\bgateway_\w+)(\{[^}]*\})?", each["expr"])
        assert read
        assert all(here in where for where in read), each["alert"]
    (gone,) = (each for each in group["rules"] if each["alert"] == "ServerGone")
    gone["expr"], _, has_answered = gone["expr"].partition(" and ")  # a replica takes minutes until it does
    assert has_answered == f"max_over_time(up{{{here}}}[30m]) == 1"
    text = json.dumps(rule["spec"]["groups"]).replace(json.dumps(here)[1:-1], "HERE")
    everywhere = json.loads(text.replace(", HERE", "").replace("{HERE}", ""))
    theirs = yaml.safe_load(RULES.read_text())["groups"]
    for groups in (everywhere, theirs):
        for each in groups[0]["rules"]:
            each["expr"] = " ".join(each["expr"].split())
    assert everywhere == theirs


def test_the_way_in_is_as_long_as_an_answer_and_as_wide_as_the_gateway_wants() -> None:
    route = objects("gpu")["HTTPRoute", "gateway"]["spec"]
    (rule,) = route["rules"]
    (backend,) = rule["backendRefs"]
    service = of_kind("gpu", "Service")[backend["name"]]
    assert backend["port"] in [port["port"] for port in service["spec"]["ports"]]
    (seconds,) = re.fullmatch(r"(\d+)s", rule["timeouts"]["request"]).groups()  # type: ignore[union-attr]
    assert int(seconds) > router("gpu").request_timeout_secs
    assert {each["path"]["value"] for each in rule["matches"]} == {"/", "/page", "/chat"}
    assert [each["path"]["type"] for each in rule["matches"] if each["path"]["value"] == "/"] == ["Exact"]


def test_the_readmes_gateway_takes_the_route() -> None:
    """Where it is, by which name it is called, and that it admits routes of this namespace."""
    gateway = yaml.safe_load(fenced("kind: Gateway\n"))
    route = objects("gpu")["HTTPRoute", "gateway"]
    (parent,) = route["spec"]["parentRefs"]
    assert parent == {key: gateway["metadata"][key] for key in ("name", "namespace")}
    assert parent["namespace"] != route["metadata"]["namespace"], "all that is not ours is closed there"
    (listener,) = gateway["spec"]["listeners"]
    assert route["spec"]["hostnames"] == [listener["hostname"]]
    admitted = listener["allowedRoutes"]["namespaces"]["selector"]["matchLabels"]
    assert admitted == {"kubernetes.io/metadata.name": route["metadata"]["namespace"]}
    (certificate,) = listener["tls"]["certificateRefs"]
    assert f"-n {parent['namespace']} create secret tls {certificate['name']} " in README


def fenced(word: str) -> str:
    """The one block of the README's that has this."""
    (block,) = (each for each in re.findall(r"^```\w+\n(.*?)^```", README, re.MULTILINE | re.DOTALL) if word in each)
    return str(block)


def test_without_a_volume_for_all_each_replica_has_its_own(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "kubernetes", tmp_path / "kubernetes")
    file = tmp_path / "kubernetes/overlays/gpu/kustomization.yaml"
    file.write_text(file.read_text() + fenced("emptyDir"))
    (deployment,) = (
        each for each in render(file.parent) if (each["kind"], each["metadata"]["name"]) == ("Deployment", "vllm")
    )
    kubernetes_validate.validate(deployment, KUBERNETES, strict=True)
    models, shm = deployment["spec"]["template"]["spec"]["volumes"]
    claim = objects("gpu")["PersistentVolumeClaim", "models"]["spec"]
    size = claim["resources"]["requests"]["storage"]
    assert models == {"name": "models", "emptyDir": {"sizeLimit": size}}
    assert shm["name"] == "shm"


def test_no_secret_goes_by_a_command_line() -> None:
    """Each comes by a pipe, and nothing is echoed while it is typed."""
    made = re.findall(r"create secret generic (.*)", README)
    assert len(made) >= 4
    for words in made:
        assert "--from-file=" in words
        assert set(re.findall(r"--from-literal=(\w+)", words)) <= {"id"}, "which is no secret"
    assert README.count("read -rs ") == README.count("&& printf %s ") == 2


def test_the_gpu_overlay_asks_for_a_gpu_and_kind_for_none() -> None:
    resources = {name: container(name, "vllm")["resources"]["limits"] for name in OVERLAYS}
    assert resources["gpu"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in resources["cpu-kind"]
    assert vllm("cpu-kind").enforce_eager
    env = {each["name"]: each.get("value") for each in container("cpu-kind", "vllm")["env"]}
    assert env["OMP_NUM_THREADS"] == "1"


def test_what_kinds_pods_ask_for_fits_the_laptop_that_is_named() -> None:
    """Four cores and 16 GiB, less a core and a GiB for kind's own pods (`kubectl describe node`: 0.95, 0.3 GiB)."""
    cores, memory = 0.0, 0.0
    for name, each in of_kind("cpu-kind", "Deployment").items():
        spec = pod("cpu-kind", name)
        (asked,) = (one["resources"]["requests"] for one in spec["containers"])
        first = [one["resources"]["requests"] for one in spec.get("initContainers", ())]  # one after the other
        copies = each["spec"]["replicas"]
        cores += copies * max(float(parse_quantity(one["cpu"])) for one in [asked, *first])
        memory += copies * max(float(parse_quantity(one["memory"])) for one in [asked, *first])
    assert cores <= 3
    assert memory <= 15 * 2**30


def test_the_autoscalers_prometheus_may_read_the_replicas() -> None:
    """Its namespace is the one that the network's rules let in, at the port that it is told of."""
    (address,) = {
        each["metadata"]["serverAddress"] for each in objects("gpu")["ScaledObject", "vllm"]["spec"]["triggers"]
    }
    namespace = re.fullmatch(r"http://[\w-]+\.([\w-]+):\d+", address)
    assert namespace
    admitted = find_from(objects("gpu")["NetworkPolicy", "vllm"])
    named = [each["namespaceSelector"]["matchLabels"] for each in admitted if "namespaceSelector" in each]
    assert named == [{"kubernetes.io/metadata.name": namespace[1]}]
    assert f"namespace `{namespace[1]}`" in README


@each_overlay
def test_no_pod_is_restarted_for_the_fault_of_whom_it_calls(overlay: str) -> None:
    """Nor is a gateway taken out: whether it is ready is its own affair. The router asks for one replica."""

    def paths(name: str) -> list[str]:
        probes = container(overlay, name)
        return [probes[kind]["httpGet"]["path"] for kind in ("readinessProbe", "livenessProbe")]

    assert paths("gateway") == ["/healthz", "/healthz"]
    assert paths("vllm-router") == ["/readiness", "/liveness"]


def test_the_readme_names_a_registry_for_every_image() -> None:
    images = {one["image"].partition(":")[0] for name in of_kind("gpu", "Deployment") for one in all_containers(name)}
    (words,) = re.findall(r"^cd kubernetes/overlays/gpu\nkustomize edit set image ([^#\n]*)", README, re.MULTILINE)
    assert {word.partition("=")[0] for word in words.split()} == images
    alone = [*(ROOT / "kubernetes/kserve").glob("*.yaml"), ROOT / "kubernetes/jupyterhub/front.yaml"]
    changed = {file: (old, new) for old, new, file in re.findall(r"^sed 's#(.*)#(.*)#' (\S+)", README, re.MULTILINE)}
    for file in alone:
        path, text = str(file.relative_to(ROOT)), file.read_text()
        assert path in README
        old, new = changed.get(path, ("", ""))
        left = re.findall(r"^ +(?:- )?image: (.*)$", text.replace(old, new) if old else text, re.MULTILINE)
        assert [image for image in left if not image.startswith("REGISTRY/servebook:")] == [], path


def all_containers(name: str) -> list[Object]:
    spec = pod("gpu", name)
    return [*spec["containers"], *spec.get("initContainers", ())]


def test_the_readme_asks_the_gateway_once_it_is_there() -> None:
    commands = README[README.index("## On kind") : README.index("## On GPUs")]
    order = ["deployment/vllm ", "deployment/gateway ", "port-forward", "--retry-connrefused", "/chat"]
    assert [commands.index(word) for word in order] == sorted(commands.index(word) for word in order)
    assert "--json" not in commands, "needs a curl of 2022"


def test_the_model_of_the_base_is_where_its_init_container_puts_it(tmp_path: Path) -> None:
    from servebook.engine.model import bundled_path
    from servebook.settings import Settings

    (first,) = pod("cpu-kind", "vllm")["initContainers"]
    env = {each["name"]: each["value"] for each in first["env"]}
    put = bundled_path(Settings(cache_dir=Path(env["SERVEBOOK_CACHE_DIR"])))
    assert container("cpu-kind", "vllm")["command"][2] == str(put)
    (fetch,) = pod("gpu", "vllm")["initContainers"]
    options = dict(re.findall(r"--([\w-]+)=(\S+)", " ".join(fetch["command"])))
    assert options["local-dir"] == container("gpu", "vllm")["command"][2]


def test_the_weights_are_those_of_one_commit_in_a_folder_of_its_own() -> None:
    (fetch,) = pod("gpu", "vllm")["initContainers"]
    options = dict(re.findall(r"--([\w-]+)=(\S+)", " ".join(fetch["command"])))
    assert re.fullmatch(r"[0-9a-f]{40}", options["revision"])
    assert options["local-dir"].endswith(f"-{options['revision'][:8]}")
