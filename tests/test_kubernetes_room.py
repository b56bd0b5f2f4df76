"""A room on Kubernetes: the front's manifests, the values for Zero to JupyterHub, and that the two meet.

The chart has no Python package: its keys, and the authenticator of its hub image, were read from its source.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
import requests
import typer
import typer.main
import yaml
from aiohttp import ClientSession
from aiohttp.test_utils import TestServer
from classroom import bearer
from desk import eventually
from kustomization import Object, render
from tornado.web import HTTPError

from servebook.processes import free_port
from servebook.room.__main__ import SHUTDOWN_SECONDS
from servebook.room.__main__ import main as room
from servebook.room.board import watch_key
from servebook.room.collect import collect
from servebook.room.front import Front
from servebook.room.keys import Roll
from servebook.room.limits import Limits

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "kubernetes/jupyterhub"
README = (ROOT / "kubernetes/README.md").read_text()
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
KEY = "the instructor's key"
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
    assert options()["drain_seconds"] >= longest
    assert FRONT["spec"]["terminationGracePeriodSeconds"] > sleep + options()["drain_seconds"]
    assert sleep <= 10, "nothing else serves meanwhile: there is one front"
    gateway = base["Deployment", "gateway"]["spec"]["template"]["spec"]
    within = {"runAsGroup": 1000, "fsGroup": 1000}  # its volume is its own
    assert FRONT["spec"]["securityContext"] == gateway["securityContext"] | within
    assert CONTAINER["securityContext"] == gateway["containers"][0]["securityContext"]
    for setting in ("automountServiceAccountToken", "enableServiceLinks"):
        assert FRONT["spec"][setting] is gateway[setting] is False


class SlowEngine(BaseHTTPRequestHandler):
    """In the place of vLLM: an answer whose end waits for `goes_on`."""

    goes_on = threading.Event()

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for event in (b"{}", b"[DONE]"):
            with suppress(OSError):
                self.wfile.write(b"data: " + event + b"\n\n")
                self.wfile.flush()
            self.goes_on.wait(60)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def slow_engine() -> Iterator[str]:
    SlowEngine.goes_on.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), SlowEngine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        SlowEngine.goes_on.set()
        server.shutdown()


@contextmanager
def front_of_the_manifest(tmp_path: Path, upstream: str, *others: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The front as the manifest starts it, but for where it listens, whom it asks and where its roll is."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    here = ["--host=127.0.0.1", f"--http-port={port}", f"--upstream={upstream}", f"--roll={tmp_path / 'keys.json'}"]
    command = [sys.executable, *CONTAINER["command"][1:], *CONTAINER["args"], *here, *others]  # the last word counts
    with subprocess.Popen(command, env=os.environ | {"SERVEBOOK_API_KEY": KEY}) as process:
        try:
            eventually(lambda: process.poll() is not None or answers(url), "the front is up")
            assert process.poll() is None
            yield url, process
        finally:
            process.kill()


def answers(url: str) -> bool:
    with suppress(requests.ConnectionError):
        return requests.get(f"{url}/services/watch/", timeout=10).ok
    return False


def begin(url: str) -> Iterator[bytes]:
    """The lines of an answer that is under way."""
    admitted = requests.put(f"{url}/room/learners/ada", headers=bearer(KEY), timeout=10)
    ask = {"prompt": "a", "max_tokens": 3, "stream": True}
    headers = bearer(admitted.json()["key"])
    lines = requests.post(f"{url}/v1/completions", json=ask, headers=headers, stream=True, timeout=60).iter_lines()
    assert next(lines) == b"data: {}"
    return lines


@pytest.mark.lifetime
def test_a_front_that_is_told_to_go_ends_with_its_last_answer_and_without_one_at_once(
    tmp_path: Path, slow_engine: str
) -> None:
    with front_of_the_manifest(tmp_path, slow_engine) as (url, process):
        lines = begin(url)
        process.terminate()
        eventually(lambda: not answers(url), "nothing new is taken")
        assert process.poll() is None
        SlowEngine.goes_on.set()
        assert b"data: [DONE]" in list(lines)
        assert process.wait(30) == 0
    with front_of_the_manifest(tmp_path, slow_engine) as (_, process):
        process.terminate()
        assert process.wait(options()["drain_seconds"] / 4) == 0


@pytest.mark.lifetime
def test_an_answer_has_as_long_to_end_as_the_front_was_told(tmp_path: Path, slow_engine: str) -> None:
    with front_of_the_manifest(tmp_path, slow_engine, "--drain-seconds=0.1") as (url, process):
        lines = begin(url)
        process.terminate()
        process.wait(SHUTDOWN_SECONDS - 1)
        with pytest.raises(requests.RequestException):
            list(lines)


async def test_the_front_is_not_restarted_for_an_engine_that_is_gone(tmp_path: Path) -> None:
    front = Front("http://127.0.0.1:9", KEY, Roll(tmp_path / "keys.json"), Limits())
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
        by = "literal" if reference["key"] == "id" else "file"
        assert f"--from-{by}={reference['key']}=" in made[0]


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


def test_the_charts_images_have_time_to_come() -> None:
    """Its hook fetches the desk's image on every node, and helm gives up after 5 minutes by itself."""
    for text in (README, (FOLDER / "values.yaml").read_text()):
        (command,) = re.findall(r"helm upgrade --install (?:.*\\\n)*.*", text)
        assert "--timeout 30m" in command
        assert "--cleanup-on-fail" in command


KUBECTL = """#!{python} -P
import base64, os, subprocess, sys
words = sys.argv[1:]
assert words.pop(0) == "-n" and words.pop(0) == "room", words
folder, python = {folder!r}, {python!r}
if words[:2] == ["get", "secret"]:
    assert words[2:] == ["vllm-api-key", "-o", "jsonpath={{.data.key}}"], words
    sys.stdout.write(base64.b64encode({key!r}.encode()).decode())
elif words[:2] == ["get", "pods"]:
    assert words[2:4] == ["--selector", "component=singleuser-server"], words
    print("jupyter-ada ada", "jupyter-grace---1a2b grace.h", sep="\\n")
elif words[0] == "exec":
    at = words.index("--")
    pod, command = words[at - 1], words[at + 1 :]
    if pod == "deployment/front":
        os.environ["SERVEBOOK_API_KEY"] = {key!r}
    if command[0] == "python":
        command[0] = python
    command = [word.replace("/home/servebook/desk", f"{{folder}}/{{pod}}") for word in command]
    sys.exit(subprocess.run(command, stdin=None if "--stdin" in words else subprocess.DEVNULL).returncode)
else:
    assert words[0] in ("port-forward", "delete"), words
"""
CURL = """#!{python} -P
import sys
import requests
_, _, method, _, header, url = sys.argv[1:]
with open(header.removeprefix("@")) as file:
    name, _, value = file.read().partition(": ")
print(requests.request(method, url, headers={{name: value}}, timeout=10).text)
"""


def in_bash(block: str, folder: Path) -> str:
    """What a block of the README's prints, with stand-ins for the cluster, curl and the grading."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    stand_ins = {"kubectl": KUBECTL, "curl": CURL, "servebook": '#!/bin/sh\necho "servebook $*"\n'}
    for name, text in stand_ins.items():
        (programs / name).write_text(text.format(python=sys.executable, folder=str(folder / "pods"), key=KEY))
        (programs / name).chmod(0o755)
    env = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(folder)}
    ran = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", block], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def block_of(word: str) -> str:
    (block,) = (each for each in re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL) if word in each)
    return str(block)


async def test_the_instructor_watches_and_revokes_by_the_readmes_commands(tmp_path: Path) -> None:
    roll = Roll(tmp_path / "keys.json")
    key = roll.issue("ada")
    front = Front("http://127.0.0.1:9", KEY, roll, Limits())
    async with TestServer(front.app()) as server:
        at = str(server.make_url("")).rstrip("/")
        block = block_of("watch_key").replace(f"http://127.0.0.1:{options()['http_port']}", at)
        before, again = block.split("front PUT")
        said = await asyncio.to_thread(in_bash, before, tmp_path)
        assert f"{at}/services/watch/#{watch_key(KEY)}" in said
        assert '"name": "ada", "revoked": false' in said
        assert roll.revoked("ada")
        definition = before[before.index("KEY=") : before.index("kubectl -n room exec")]
        definition += before[before.index("front() {") : before.index("front GET")]
        admitted, forgotten = again.split("front DELETE")
        said = await asyncio.to_thread(in_bash, f"{definition}front PUT{admitted}", tmp_path)
        assert roll.name_of(json.loads(said)["key"]) == "ada"
        assert roll.name_of(key) is None
        await asyncio.to_thread(in_bash, f"{definition}front DELETE{forgotten}", tmp_path)
        assert roll.entries == {}


def test_what_desks_have_is_collected_and_feedback_brought_by_the_readmes_commands(tmp_path: Path) -> None:
    """A file at a time, where `servebook room collect` looks for it; what is too large is not taken whole."""
    desk, home = tmp_path / "pods/jupyter-ada", tmp_path / "course"
    for lab in ("01_openai_rest", "02_sse_streaming"):
        (tmp_path / "labs" / lab).mkdir(parents=True)
        (desk / "labs" / lab).mkdir(parents=True)
    (desk / "labs/01_openai_rest/01_openai_rest.ipynb").write_text('{"cells": []}')
    (desk / "labs/02_sse_streaming/02_sse_streaming.ipynb").symlink_to("/dev/zero")
    page = tmp_path / "feedback/ada/01_openai_rest/01_openai_rest.html"
    page.parent.mkdir(parents=True)
    page.write_text("Well done.")
    assert in_bash(block_of("/usr/bin/head"), tmp_path) == "servebook room collect --grade\n"
    ada, grace = collect(home / "room" / "desks", tmp_path / "submitted")
    assert (ada.learner, ada.labs) == ("ada", ["01_openai_rest"])
    assert ada.left == {"02_sse_streaming": "it has more than 20 MiB"}
    assert (grace.learner, grace.labs, grace.left) == ("grace.h", [], {})
    assert (desk / "feedback/01_openai_rest.html").read_text() == "Well done."


async def test_a_desk_gets_a_key_of_its_own_and_none_after_a_revocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRONT_KEY", KEY)
    roll = Roll(tmp_path / "keys.json")
    async with TestServer(Front("http://127.0.0.1:9", KEY, roll, Limits()).app()) as front:
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
