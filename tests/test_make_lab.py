"""`make lab`: JupyterLab answers with a token only, and Ctrl-C ends it with its kernels and their servers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from desk import TINY, Desk, eventually
from websocket import create_connection

from servebook.processes import free_port

ROOT = Path(__file__).parents[1]
TOKEN = "of-this-test"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone whose set-up is done: its environment is the one that runs this test."""
    clone = tmp_path / """a 'clone' (1) & "more" [$HOME]"""
    for folder in ("jupyter", "requirements", "shims"):
        shutil.copytree(ROOT / folder, clone / folder)
    for name in ("Makefile", "pyproject.toml", "scripts/setup", "notebooks/00_start_here.ipynb"):
        (clone / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, clone / name)
    (clone / ".venv").mkdir()
    (clone / ".venv/bin").symlink_to(Path(sys.executable).parent)
    (clone / ".venv/.servebook-cpu").touch()
    return clone


@pytest.mark.lifetime
def test_make_lab(clone: Path, tmp_path: Path) -> None:
    desk = Desk(tmp_path / "state", free_port())
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = f"--no-browser --port {port} --ServerApp.port_retries=0 --IdentityProvider.token={TOKEN}"
    env = {k: v for k, v in desk.env.items() if not k.startswith(("CONDA", "MAKE"))}
    env |= {"DEVICE": "cpu", "LAB_ARGS": arguments, "PYTHONPATH": f"{TINY.parent}:{os.environ.get('PYTHONPATH', '')}"}
    # What the user has is taken first in an environment that is another user's; of the variable it is told here.
    kernel_json = tmp_path / "jupyter/kernels/python3/kernel.json"
    kernel_json.parent.mkdir(parents=True)
    kernel_json.write_text('{"argv": ["/no/such/python"], "display_name": "other", "language": "python"}')
    env |= {"JUPYTER_DATA_DIR": str(tmp_path / "jupyter"), "JUPYTER_PREFER_ENV_PATH": "0"}
    command = ["make", "-C", str(clone), "lab"]
    log = tmp_path / "lab.log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        ) as lab,
    ):

        def answers() -> bool:
            assert lab.poll() is None, log.read_text()
            try:
                return requests.get(f"{url}/api", timeout=5).ok
            except requests.RequestException:
                return False

        try:
            eventually(answers, "JupyterLab", seconds=120)
            assert "lab/tree/notebooks/00_start_here.ipynb" in log.read_text()
            assert requests.get(f"{url}/api/kernels", timeout=10).status_code == 403
            headers = {"Authorization": f"token {TOKEN}"}
            page = requests.get(f"{url}/lab/tree/notebooks/00_start_here.ipynb", headers=headers, timeout=30)
            assert page.status_code == 200
            assert '"disabledExtensions": ["@jupyter/nbgrader"' in page.text
            files = requests.get(f"{url}/api/contents/", headers=headers, timeout=30).json()["content"]
            assert {"notebooks", "requirements"} <= {file["name"] for file in files}

            kernel = requests.post(f"{url}/api/kernels", headers=headers, json={"name": "python3"}, timeout=60).json()
            channel = create_connection(
                f"ws://127.0.0.1:{port}/api/kernels/{kernel['id']}/channels", header=headers, timeout=60
            )
            code = "import tiny_server; tiny_server.install()\nfrom servebook import serve\nvllm = serve('vllm')"
            channel.send(json.dumps(execute_request(code)))
            eventually(lambda: json.loads(channel.recv())["header"]["msg_type"] == "execute_reply", "the cell's end")
            assert desk.status()["state"] == "ready"
            channel.close()
        finally:
            os.killpg(lab.pid, signal.SIGINT)  # what Ctrl-C in a terminal does
            lab.wait(60)
    assert "Traceback" not in log.read_text()
    desk.nothing_left()


def execute_request(code: str) -> dict[str, object]:
    content = {"code": code, "silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False}
    header = {"msg_id": "1", "msg_type": "execute_request", "session": "1", "username": "", "version": "5.3"}
    return {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
