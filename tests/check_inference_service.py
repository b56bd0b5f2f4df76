"""Check manifests against the models of KServe's SDK: `python tests/check_inference_service.py FILE…`.

A process of its own: `kserve` and `tritonclient.grpc` cannot be imported together.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import kserve.models
import kubernetes.client
import yaml

PRIMITIVES = {"str": str, "int": int, "float": float, "bool": bool, "object": object}
CONTAINER = re.compile(r"(list|dict)[\[(](?:str, )?(.+)[\])]", re.IGNORECASE)
"""KServe's models write `list[str]` and `dict(str, str)`, those of Kubernetes `List[str]` and `Dict[str, str]`."""


def check(data: Any, kind: str, where: str) -> Any:
    """Build `kind` from `data`, which makes the SDK check required fields and enumerations.

    Raises:
        ValueError: a field is unknown, missing or of another type.
    """
    if container := CONTAINER.fullmatch(kind):
        inner = container[2]
        if container[1].lower() == "list":
            return [check(each, inner, f"{where}[{index}]") for index, each in enumerate(data)]
        return {key: check(each, inner, f"{where}.{key}") for key, each in data.items()}
    if kind in PRIMITIVES:
        if not isinstance(data, PRIMITIVES[kind]):
            raise ValueError(f"{where}: expected {kind}, got {data!r}")
        return data
    model = getattr(kserve.models, kind, None) or getattr(kubernetes.client, kind, None)
    if model is None:  # IntOrString, ResourceQuantity and the like: a plain value
        if isinstance(data, dict | list):
            raise ValueError(f"{where}: expected a {kind}, got {data!r}")
        return data
    fields = {there: here for here, there in model.attribute_map.items()}
    if unknown := data.keys() - fields.keys():
        raise ValueError(f"{where}: {kind} has no field {', '.join(sorted(unknown))}")
    made = {fields[key]: check(each, model.openapi_types[fields[key]], f"{where}.{key}") for key, each in data.items()}
    return model(**made)


LLM_FIELDS = {
    "spec": {"model", "replicas", "scaling", "parallelism", "labels", "annotations", "template", "worker"}
    | {"router", "prefill", "baseRefs", "storageInitializer", "kvCacheOffloading"},
    "model": {"uri", "name", "lora"},
    "router": {"route", "gateway", "ingress", "scheduler"},
}
"""Of KServe's `v1alpha2/llm_inference_service_types.go`: the SDK has the kind, but not what is in its spec."""


def check_llm(manifest: Any, path: str) -> None:
    """The same for an LLMInferenceService.

    Raises:
        ValueError: a field is unknown, missing or of another type.
    """
    assert hasattr(kserve.models, "V1alpha2LLMInferenceService")
    spec = manifest["spec"]
    for name, part in {"spec": spec, "model": spec["model"], "router": spec["router"]}.items():
        if unknown := part.keys() - LLM_FIELDS[name]:
            raise ValueError(f"{path}: {name} has no field {', '.join(sorted(unknown))}")
    check(manifest["metadata"], "V1ObjectMeta", f"{path}.metadata")
    check(spec["model"]["uri"], "str", f"{path}.spec.model.uri")
    check(spec["replicas"], "int", f"{path}.spec.replicas")
    check(spec["template"], "V1PodSpec", f"{path}.spec.template")


def check_file(path: str) -> None:
    """Check the manifest in `path`.

    Raises:
        ValueError: it is none of KServe's kinds, or has a field that is unknown, missing or of another type.
    """
    manifest = yaml.safe_load(Path(path).read_text())
    match manifest["apiVersion"], manifest["kind"]:
        case "serving.kserve.io/v1beta1", "InferenceService":
            check(manifest, "V1beta1InferenceService", path)
        case "serving.kserve.io/v1alpha2", "LLMInferenceService":
            check_llm(manifest, path)
        case kind:
            raise ValueError(f"{path}: KServe has no {' '.join(kind)}")


def main(paths: list[str]) -> int:
    """Check them all; a line for each that does not fit, and how many there are."""
    wrong = 0
    for path in paths:
        try:
            check_file(path)
        except ValueError as error:
            wrong += 1
            print(error, file=sys.stderr)
    return wrong


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
