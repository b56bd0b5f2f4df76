"""JupyterHub for a room of learners on one machine; runs in the room's environment, kept by `servebook.room.hub`.

Each learner gets a desk: a folder with the notebooks and the labs, and a JupyterLab in the workbook's environment
that has the room's engine and a key of its own in its settings. All desks run as the user who runs the hub: that
keeps learners apart by accident, not by force. docs/instructor.md says what to change for people you do not know.
"""

import asyncio
import json
import os
import resource
import sys
import sysconfig
from pathlib import Path
from urllib.parse import quote

from jupyterhub.spawner import SimpleLocalProcessSpawner
from tornado.httpclient import AsyncHTTPClient, HTTPClientError
from tornado.web import HTTPError

here = Path(__file__).parent
sys.path.insert(0, str(here))

from door import Door  # noqa: E402

c = get_config()  # noqa: F821
room = json.loads(os.environ.pop("SERVEBOOK_ROOM"))
folder = Path(room["folder"])
python = Path(room["python"])

# Where everything listens. The proxy is started by whoever started us, and outlives us.
c.JupyterHub.bind_url = room["public_url"]
c.JupyterHub.hub_bind_url = room["hub_url"]
c.ConfigurableHTTPProxy.should_start = False
c.ConfigurableHTTPProxy.api_url = room["routes_url"]
c.JupyterHub.cleanup_servers = False  # a hub that is restarted finds the desks again
c.JupyterHub.db_url = f"sqlite:///{folder / 'hub.sqlite'}"
c.JupyterHub.cookie_secret_file = str(folder / "cookie_secret")

# Who comes in: learners sign up with the join code and a password of their own; nobody is an administrator.
c.JupyterHub.authenticator_class = Door
c.Door.folder = str(folder)
c.Door.open_sign_up = room["open_sign_up"]
c.Authenticator.allow_all = True
c.JupyterHub.template_paths = [str(here / "templates")]
# The proxy stands in between: whom it names as the caller, or a web server before it on this machine, is believed.
c.JupyterHub.trusted_downstream_ips = ["127.0.0.1"]

# How many: beyond these the hub refuses in words, and its page tries again by itself where that helps.
c.JupyterHub.active_server_limit = room["seats"]
c.JupyterHub.concurrent_spawn_limit = max(4, 2 * (os.cpu_count() or 1))
c.Spawner.start_timeout = 180
c.Spawner.http_timeout = 120

# What goes on by itself: desks that nobody sits at are closed. The instructor's key opens the hub's API.
c.JupyterHub.services = [
    {
        "name": "idle-culler",
        "command": [
            *(str(Path(sysconfig.get_path("scripts")) / "python"), "-m", "jupyterhub_idle_culler"),
            *(f"--timeout={2 * room['idle_seconds']}", f"--cull-every={min(300, room['idle_seconds'])}"),
        ],
    },
    {"name": "instructor", "api_token": room["key"]},
]
c.JupyterHub.load_roles = [
    {
        "name": "idle-culler",
        "scopes": ["list:users", "read:users:activity", "read:servers", "delete:servers"],
        "services": ["idle-culler"],
    },
    {
        "name": "instructor",
        "scopes": ["admin:users", "admin:servers", "access:servers", "list:users", "read:hub", "proxy", "shutdown"],
        "services": ["instructor"],
    },
]


class Desk(SimpleLocalProcessSpawner):
    """A learner's JupyterLab as a local process, after the engine's processes in line for the cores."""

    home_dir_template = str(folder / "desks" / "{username}")

    def make_preexec_fn(self, name):
        enter_home = super().make_preexec_fn(name)
        memory = int(room["memory_gib"] * 2**30)

        def preexec():
            enter_home()
            os.nice(10)
            # Each process of a learner, kernels included, gets a MemoryError or is ended; nobody else notices.
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
            resource.setrlimit(resource.RLIMIT_CPU, (room["cpu_seconds"], room["cpu_seconds"] + 30))

        return preexec

    async def key(self):
        """A new key from the room's front; a learner whose key was revoked gets no desk either."""
        try:
            answer = await AsyncHTTPClient().fetch(
                f"{room['front']}/room/learners/{quote(self.user.name)}",
                method="PUT",
                body="",
                headers={"Authorization": f"Bearer {room['key']}"},
            )
        except HTTPClientError as error:
            if error.code == 403:
                raise HTTPError(403, f"The instructor has revoked the key of {self.user.name}.") from None
            raise
        return json.loads(answer.body)["key"]

    async def lay_out(self):
        """Put notebooks and labs on the desk; what is there already stays."""
        command = [str(python), "-P", "-m", "servebook.room.desk", str(folder / "master"), self.home_dir]
        child = await asyncio.create_subprocess_exec(*command, env=self.get_env())
        if await child.wait():
            raise HTTPError(500, "Your desk could not be laid out; the hub's log says why.")

    async def start(self):
        self.environment = self.environment | {"SERVEBOOK_API_KEY": await self.key()}
        await self.lay_out()
        return await super().start()


c.JupyterHub.spawner_class = Desk
c.Spawner.cmd = [str(python), "-P", str(here / "singleuser.py"), sysconfig.get_path("purelib")]
c.Spawner.args = [
    # A kernel without a sign of life is ended, at work or not, with or without a page that shows it.
    f"--MappingKernelManager.cull_idle_timeout={room['idle_seconds']}",
    f"--MappingKernelManager.cull_interval={min(60, room['idle_seconds'])}",
    "--MappingKernelManager.cull_busy=True",
    "--MappingKernelManager.cull_connected=True",
    *(["--allow-root"] if os.getuid() == 0 else []),
]
c.Spawner.default_url = "/lab/tree/notebooks/00_start_here.ipynb"
c.Spawner.environment = {
    "PATH": f"{python.parent}{os.pathsep}{os.defpath}",
    "LANG": "C.UTF-8",
    "JUPYTER_CONFIG_PATH": str(here.parent / "jupyter"),
    "SERVEBOOK_CACHE_DIR": room["cache_dir"],
    "SERVEBOOK_ENGINE_URL": room["front"],
    "SERVEBOOK_MODEL": room["model"],
    "SERVEBOOK_SERVED_NAME": room["served_name"],
    "SERVEBOOK_JUDGE_APART": "1",  # checks are made by a process of its own
}
