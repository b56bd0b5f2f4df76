"""The manifests for vLLM and its router fit Kubernetes' schemas and the parsers of the programs that they start.

They are not applied to a cluster here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from vllm_router.launch_router import parse_router_args

from servebook.engine.arguments import engine_args

MANIFESTS = Path(__file__).parents[1] / "kubernetes" / "router"
KUBERNETES = "1.33"


def objects() -> dict[tuple[str, str], dict[str, Any]]:
    """Every object of every manifest, by kind and name."""
    found = [each for path in sorted(MANIFESTS.glob("*.yaml")) for each in yaml.safe_load_all(path.read_text())]
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


def container(name: str) -> dict[str, Any]:
    (one,) = objects()["Deployment", name]["spec"]["template"]["spec"]["containers"]
    return dict(one)


@pytest.mark.parametrize("which", objects(), ids=lambda which: "-".join(which))
def test_manifest_fits_the_schemas(which: tuple[str, str]) -> None:
    kubernetes_validate.validate(objects()[which], KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("replicas: 2", "replicas: two", "'two' is not of type"),
        ("{path: /readiness", "{paht: /readiness", "'paht' was unexpected"),
        ("serviceAccountName", "serviceAcountName", "'serviceAcountName' was unexpected"),
    ],
)
def test_the_schemas_find_mistakes(right: str, wrong: str, problem: str) -> None:
    (path,) = [path for path in MANIFESTS.glob("*.yaml") if right in path.read_text()]
    manifest = yaml.safe_load_all(path.read_text().replace(right, wrong))
    (broken,) = [each for each in manifest if each["kind"] == "Deployment"]
    with pytest.raises(kubernetes_validate.ValidationError, match=problem):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


def test_the_router_understands_its_arguments_and_looks_for_the_replicas() -> None:
    args = parse_router_args(container("vllm-router")["args"])
    replicas = objects()["Deployment", "vllm"]["spec"]["template"]
    assert args.service_discovery
    assert args.selector.items() <= replicas["metadata"]["labels"].items()
    assert args.service_discovery_port in [port["containerPort"] for port in container("vllm")["ports"]]
    ports = {port["name"]: port["containerPort"] for port in container("vllm-router")["ports"]}
    assert ports == {"http": args.port, "metrics": args.prometheus_port}


def test_vllm_understands_its_arguments() -> None:
    words = [word for word in container("vllm")["args"] if not word.startswith("--port")]
    args = engine_args(words)
    assert (args.served_model_name, args.max_model_len) == (["smollm2"], 2048)


def test_the_router_may_see_pods_and_nothing_else() -> None:
    (rule,) = objects()["Role", "vllm-router"]["rules"]
    assert rule == {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    binding = objects()["RoleBinding", "vllm-router"]
    (account,) = binding["subjects"]
    assert ("ServiceAccount", account["name"]) in objects()
    assert ("Role", binding["roleRef"]["name"]) in objects()
    assert objects()["Deployment", "vllm-router"]["spec"]["template"]["spec"]["serviceAccountName"] == account["name"]
