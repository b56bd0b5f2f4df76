"""The manifests for KServe on Kubernetes fit the models of KServe's SDK; they are not applied to a cluster here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from servebook.settings import TENSOR_MODEL_NAME

MANIFESTS = Path(__file__).parents[1] / "kubernetes" / "kserve"


MISTAKES = {
    "1": ("vllm-runtime", "storageUri:", "storageURI:", "V1beta1ModelSpec has no field storageURI"),
    "2": ("vllm-runtime", "minReplicas: 1", "minReplicas: one", "expected int, got 'one'"),
    "3": ("vllm-runtime", 'cpu: "4"', "cpu: 4", "expected str, got 4"),
    "4": ("llm-inference-service", "scheduler:", "sheduler:", "router has no field sheduler"),
    "5": (
        "llm-inference-service",
        "v1alpha2",
        "v1beta1",
        "KServe has no serving.kserve.io/v1beta1 LLMInferenceService",
    ),
    "6": ("llm-inference-service", "resources:", "resource:", "V1Container has no field resource"),
}


def check_manifests(*manifests: Path) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("check_inference_service.py")
    return subprocess.run([sys.executable, script, *manifests], capture_output=True, text=True, timeout=120)


def test_manifests_fit_kserves_models() -> None:
    manifests = sorted(MANIFESTS.glob("*.yaml"))
    assert len(manifests) == 3
    checked = check_manifests(*manifests)
    assert checked.returncode == 0, checked.stderr


def test_check_of_manifests_finds_mistakes(tmp_path: Path) -> None:
    for number, (name, right, wrong, _) in MISTAKES.items():
        text = (MANIFESTS / f"{name}.yaml").read_text()
        assert right in text
        (tmp_path / f"{number}.yaml").write_text(text.replace(right, wrong))
    checked = check_manifests(*(tmp_path / f"{number}.yaml" for number in MISTAKES))
    assert checked.returncode == 1
    found = checked.stderr.splitlines()
    assert len(found) == len(MISTAKES)
    for line, (*_, problem) in zip(found, MISTAKES.values(), strict=True):
        assert problem in line


def test_the_predictor_is_asked_where_it_listens_and_has_room_to_talk() -> None:
    predictor = yaml.safe_load((MANIFESTS / "custom-predictor.yaml").read_text())["spec"]["predictor"]
    (container,) = predictor["containers"]
    assert f"--http-port={container['ports'][0]['containerPort']}" in container["args"]
    probes = [container[kind]["httpGet"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert {probe["port"] for probe in probes} == {container["ports"][0]["containerPort"]}
    assert f"/v2/models/{TENSOR_MODEL_NAME}/ready" in {probe["path"] for probe in probes}
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in predictor["volumes"]}
    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert predictor["terminationGracePeriodSeconds"] > sleep >= predictor["timeout"]  # counted from before it
    env = {each["name"]: each["value"] for each in container["env"]}
    assert env["OMP_NUM_THREADS"] == container["resources"]["limits"]["cpu"]
