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


def main(paths: list[str]) -> None:
    for path in paths:
        manifest = yaml.safe_load(Path(path).read_text())
        if (manifest["apiVersion"], manifest["kind"]) != ("serving.kserve.io/v1beta1", "InferenceService"):
            raise ValueError(f"{path}: not an InferenceService")
        check(manifest, "V1beta1InferenceService", path)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(str(error))
