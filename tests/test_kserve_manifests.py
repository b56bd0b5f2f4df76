"""The manifests for KServe on Kubernetes fit the models of KServe's SDK; they are not applied to a cluster here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MANIFESTS = Path(__file__).parents[1] / "kubernetes" / "kserve"


def check_manifest(manifest: Path) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("check_inference_service.py")
    return subprocess.run([sys.executable, script, manifest], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["custom-predictor.yaml", "vllm-runtime.yaml"])
def test_manifest_fits_kserves_models(name: str) -> None:
    checked = check_manifest(MANIFESTS / name)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("storageUri:", "storageURI:", "V1beta1ModelSpec has no field storageURI"),
        ("minReplicas: 1", "minReplicas: one", "expected int, got 'one'"),
        ('cpu: "4"', "cpu: 4", "expected str, got 4"),
    ],
)
def test_check_of_manifests_finds_mistakes(tmp_path: Path, right: str, wrong: str, problem: str) -> None:
    text = (MANIFESTS / "vllm-runtime.yaml").read_text()
    assert right in text
    (tmp_path / "broken.yaml").write_text(text.replace(right, wrong))
    checked = check_manifest(tmp_path / "broken.yaml")
    assert checked.returncode == 1
    assert problem in checked.stderr
