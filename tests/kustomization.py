"""Renders an overlay of kubernetes/ as `kubectl kustomize` does, as far as these overlays go.

Kustomize is no Python package, and so in no lock; where it is there, a test holds this to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
CLUSTER_WIDE = {"Namespace"}
MERGED_BY = {name: "name" for name in ("containers", "initContainers", "env", "volumes")} | {
    "volumeMounts": "mountPath"
}
"""Lists that a patch adds to, and the field by which it finds what is there; it replaces all others."""
UNDERSTOOD = {"apiVersion", "kind", "namespace", "resources", "patches", "secretGenerator", "generatorOptions"}


def render(folder: Path) -> list[Object]:
    """Every object of the kustomization in `folder`.

    Raises:
        ValueError: it uses what is not understood here, a patch meets none or several objects, or what it replaces or
            removes is not there.
    """
    settings = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := settings.keys() - UNDERSTOOD:
        raise ValueError(f"{folder}: not understood: {', '.join(sorted(unknown))}")
    objects: list[Object] = []
    for name in settings["resources"]:
        path = folder / name
        objects += render(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for each in settings.get("secretGenerator", ()):
        pairs = dict(literal.split("=", 1) for literal in each["literals"])
        objects.append({"kind": "Secret", "apiVersion": "v1", "metadata": {"name": each["name"]}, "stringData": pairs})
    for patch in settings.get("patches", ()):
        if "path" in patch:
            change = yaml.safe_load((folder / patch["path"]).read_text())
            target = _only(objects, change["kind"], change["metadata"]["name"])
            _merge(target, change)
        else:
            target = _only(objects, patch["target"]["kind"], patch["target"]["name"])
            for step in yaml.safe_load(patch["patch"]):
                _apply(target, step)
    for each in objects:
        if each["kind"] not in CLUSTER_WIDE:
            each["metadata"]["namespace"] = settings["namespace"]
    return objects


def _only(objects: list[Object], kind: str, name: str) -> Object:
    found = [each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    if len(found) != 1:
        raise ValueError(f"a patch for {kind} {name} meets {len(found)} objects")
    return found[0]


def _merge(into: Object, change: Object) -> None:
    for key, new in change.items():
        if isinstance(new, dict) and isinstance(into.get(key), dict):
            _merge(into[key], new)
        elif key in MERGED_BY and key in into:
            by = MERGED_BY[key]
            there = {each[by]: each for each in into[key]}
            for each in new:
                if each[by] in there:
                    _merge(there[each[by]], each)
                else:
                    into[key].append(each)
        else:
            into[key] = new


def _apply(target: Object, step: Object) -> None:
    *way, last = step["path"].strip("/").split("/")
    place: Any = target
    for word in way:
        place = place[int(word)] if isinstance(place, list) else place[word]
    if isinstance(place, list) and (step["op"], last) == ("add", "-"):
        place.append(step["value"])
    elif isinstance(place, list) and last.isdecimal() and int(last) < len(place) and step["op"] == "replace":
        place[int(last)] = step["value"]
    elif last not in place:
        raise ValueError(f"a patch for {target['kind']} wants to {step['op']} {step['path']}, which is not there")
    elif step["op"] == "remove":
        del place[last]
    elif step["op"] == "replace":
        place[last] = step["value"]
    else:
        raise ValueError(f"not understood: {step['op']} {step['path']}")
