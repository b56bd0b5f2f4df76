"""A room on Kubernetes: the front's manifests, the values for Zero to JupyterHub, and that the two meet.

The chart has no Python package: its keys, and the authenticator of its hub image, were read from its source.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
import typer
import typer.main
import yaml
from aiohttp import ClientSession
from aiohttp.test_utils import TestServer
from kustomization import Object, render
from tornado.web import HTTPError

from servebook.room.__main__ import SHUTDOWN_SECONDS
from servebook.room.__main__ import main as room
from servebook.room.front import Front
from servebook.room.keys import Roll
from servebook.room.limits import Limits

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "kubernetes/jupyterhub"
README = (ROOT / "kubernetes/README.md").read_text()
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
VALUES: Object = yaml.safe_load((FOLDER / "values.yaml").read_text())
OBJECTS = {
    (each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all((FOLDER / "front.yaml").read_text())
}
FRONT = OBJECTS["Deployment", "front"]["spec"]["template"]
(CONTAINER,) = FRONT["spec"]["containers"]
CHARTS_PODS = {"singleuser-server", "hub"}
"""The label `component` that the chart gives to desks and to the hub, beside `app: jupyterhub`."""


def options() -> dict[str, Any]:
    """The front's arguments, as its own parser reads them."""
    app = typer.Typer()
    app.command()(room)
    return typer.main.get_command(app).make_context("room", list(CONTAINER["args"])).params


def policy(name: str) -> Object:
    return dict(OBJECTS["NetworkPolicy", name]["spec"])


def test_the_fronts_objects_fit_the_schemas() -> None:
    for each in OBJECTS.values():
        kubernetes_validate.validate(each, "1.33", strict=True)


def test_the_front_reaches_the_router_and_keeps_its_roll() -> None:
    base = {(each["kind"], each["metadata"]["name"]): each for each in render(ROOT / "kubernetes/base")}
    service, namespace = re.fullmatch(r"http://([\w-]+)\.([\w-]+)", options()["upstream"]).groups()  # type: ignore[union-attr]
    router = base["Service", service]
    assert router["metadata"]["namespace"] == namespace
    assert 80 in [port["port"] for port in router["spec"]["ports"]]
    admitted = policy("front-to-router")
    assert OBJECTS["NetworkPolicy", "front-to-router"]["metadata"]["namespace"] == namespace
    assert admitted["podSelector"]["matchLabels"] == router["spec"]["selector"]
    (caller,) = admitted["ingress"][0]["from"]
    assert caller["podSelector"]["matchLabels"] == FRONT["metadata"]["labels"]
    own = OBJECTS["Deployment", "front"]["metadata"]["namespace"]
    assert caller["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": own}
    assert options()["roll"].parent == Path(CONTAINER["volumeMounts"][0]["mountPath"])
    assert ("PersistentVolumeClaim", FRONT["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]) in OBJECTS
    assert OBJECTS["Deployment", "front"]["spec"]["strategy"] == {"type": "Recreate"}


def test_the_front_lets_the_longest_answer_end_and_may_do_nothing_else() -> None:
    base = {(each["kind"], each["metadata"]["name"]): each for each in render(ROOT / "kubernetes/base")}
    router = base["Deployment", "vllm-router"]["spec"]["template"]["spec"]["containers"][0]["args"]
    (longest,) = (int(word.partition("=")[2]) for word in router if word.startswith("--request-timeout-secs="))
    sleep = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert FRONT["spec"]["terminationGracePeriodSeconds"] > sleep + SHUTDOWN_SECONDS > longest
    gateway = base["Deployment", "gateway"]["spec"]["template"]["spec"]
    within = {"runAsGroup": 1000, "fsGroup": 1000}  # its volume is its own
    assert FRONT["spec"]["securityContext"] == gateway["securityContext"] | within
    assert CONTAINER["securityContext"] == gateway["containers"][0]["securityContext"]
    for setting in ("automountServiceAccountToken", "enableServiceLinks"):
        assert FRONT["spec"][setting] is gateway[setting] is False


async def test_the_front_is_not_restarted_for_an_engine_that_is_gone(tmp_path: Path) -> None:
    front = Front("http://127.0.0.1:9", "the instructor's key", Roll(tmp_path / "keys.json"), Limits())
    async with TestServer(front.app()) as server, ClientSession(server.make_url("/")) as session:
        for kind in ("readinessProbe", "livenessProbe"):
            assert CONTAINER[kind]["httpGet"]["port"] == "http"
            async with session.get(CONTAINER[kind]["httpGet"]["path"]) as answer:
                assert answer.status == 200, kind


def test_desks_and_the_hub_reach_the_front_and_desks_nothing_else() -> None:
    port = options()["http_port"]
    assert CONTAINER["ports"] == [{"name": "http", "containerPort": port}]
    service = OBJECTS["Service", "front"]["spec"]
    assert service["ports"] == [{"name": "http", "port": port, "targetPort": "http"}]
    assert service["selector"] == policy("front")["podSelector"]["matchLabels"] == FRONT["metadata"]["labels"]
    callers = [each["podSelector"]["matchLabels"] for each in policy("front")["ingress"][0]["from"]]
    assert {each["component"] for each in callers} == CHARTS_PODS
    assert {each["app"] for each in callers} == {"jupyterhub"}
    (rule,) = VALUES["singleuser"]["networkPolicy"]["egress"]
    assert rule["to"] == [{"podSelector": {"matchLabels": FRONT["metadata"]["labels"]}}]
    assert rule["ports"] == [{"port": port, "protocol": "TCP"}]
    assert VALUES["singleuser"]["networkPolicy"]["egressAllowRules"] == {"nonPrivateIPs": False}
    assert VALUES["singleuser"]["extraEnv"]["SERVEBOOK_ENGINE_URL"] == f"http://front:{port}"


def test_nobody_comes_in_without_a_word_from_the_identity_provider() -> None:
    config = VALUES["hub"]["config"]
    assert config["JupyterHub"]["authenticator_class"] == "generic-oauth"
    assert config["GenericOAuthenticator"]["allowed_groups"]
    assert config["GenericOAuthenticator"]["manage_groups"]  # without it the groups are not looked at
    (host,) = VALUES["proxy"]["https"]["hosts"]
    assert config["GenericOAuthenticator"]["oauth_callback_url"] == f"https://{host}/hub/oauth_callback"


def test_secrets_are_named_in_the_readme() -> None:
    references = [each["valueFrom"]["secretKeyRef"] for each in VALUES["hub"]["extraEnv"].values()]
    references += [each["valueFrom"]["secretKeyRef"] for each in CONTAINER["env"]]
    assert len(references) == 4
    for reference in references:
        made = re.search(rf"-n room create secret generic {reference['name']} .*", README)
        assert made
        assert f"--from-literal={reference['key']}=" in made[0]


def test_an_engine_at_a_desk_has_the_shared_memory_of_those_of_the_base() -> None:
    base = {(each["kind"], each["metadata"]["name"]): each for each in render(ROOT / "kubernetes/base")}
    engine = base["Deployment", "vllm"]["spec"]["template"]["spec"]
    storage = VALUES["singleuser"]["storage"]
    assert storage["extraVolumes"] == [each for each in engine["volumes"] if each["name"] == "shm"]
    (mount,) = storage["extraVolumeMounts"]
    assert mount in engine["containers"][0]["volumeMounts"]


def test_the_desk_starts_what_its_image_has() -> None:
    desk = VALUES["singleuser"]
    image, tag = re.search(r"docker build -t ([\w-]+):(\S+) ", DOCKERFILE).groups()  # type: ignore[union-attr]
    assert desk["image"] == {"name": f"registry.example.org/{image}", "tag": tag}
    assert f"-t {image}:{tag} -f kubernetes/jupyterhub/Dockerfile" in README
    cmd = re.search(r"^CMD (.*)$", DOCKERFILE, flags=re.MULTILINE)
    assert cmd
    assert [word.removeprefix("/servebook/") for word in desk["cmd"]] == yaml.safe_load(cmd[1])
    assert (ROOT / "jupyterhub/singleuser.py").is_file()
    (hub,) = re.findall(r"^ARG HUB=(\S+)$", DOCKERFILE, flags=re.MULTILINE)
    (chart,) = re.findall(r"chart (\S+): " + re.escape(hub), DOCKERFILE)
    assert f"chart {chart} (JupyterHub {hub})" in (FOLDER / "values.yaml").read_text()
    assert f"--version {chart} " in README
    *_, master, home = desk["lifecycleHooks"]["postStart"]["exec"]["command"]
    assert master == "/servebook/master"
    assert "&& mkdir master" in DOCKERFILE
    assert home == desk["storage"]["homeMountPath"] == VALUES["hub"]["config"]["KubeSpawner"]["notebook_dir"]
    assert desk["extraEnv"]["SERVEBOOK_STATE_DIR"].startswith(home)


async def test_a_desk_gets_a_key_of_its_own_and_none_after_a_revocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRONT_KEY", "the instructor's key")
    roll = Roll(tmp_path / "keys.json")
    async with TestServer(Front("http://127.0.0.1:9", "the instructor's key", roll, Limits()).app()) as front:
        (code,) = VALUES["hub"]["extraConfig"].values()
        config = SimpleNamespace(Spawner=SimpleNamespace())
        exec(code.replace("http://front:8095", str(front.make_url("")).rstrip("/")), {"c": config})
        spawner = SimpleNamespace(user=SimpleNamespace(name="ada"), environment={"A": "1"})
        await config.Spawner.pre_spawn_hook(spawner)
        assert spawner.environment["A"] == "1"
        assert roll.name_of(spawner.environment["SERVEBOOK_API_KEY"]) == "ada"
        roll.revoke("ada")
        with pytest.raises(HTTPError, match="revoked the key of ada"):
            await config.Spawner.pre_spawn_hook(spawner)
