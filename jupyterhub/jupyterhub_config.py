"""JupyterHub for a room of learners on one machine; runs in the room's environment, kept by `servebook.room.hub`.

Each learner gets a desk: a folder with the notebooks and the labs, and a JupyterLab in the workbook's environment
that has the room's engine and a key of its own in its settings. `door.py` lets learners in, `desks.py` starts desks.
"""

import json
import os
import sys
import sysconfig
from pathlib import Path

here = Path(__file__).parent
sys.path.insert(0, str(here))

from desks import DeskSpawner  # noqa: E402
from door import Door, log_request  # noqa: E402

c = get_config()  # noqa: F821
room = json.loads(os.environ.pop("SERVEBOOK_HUB_CONFIG"))
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
c.Door.secure = room["secure"]
c.Door.proxys_sign = os.environ.pop("SERVEBOOK_PROXY_SECRET")
c.JupyterHub.tornado_settings = {"log_function": log_request}
if room["secure"]:
    c.JupyterHub.tornado_settings["cookie_options"] = {"secure": True}
c.Authenticator.allow_all = True
c.JupyterHub.template_paths = [str(here / "templates")]
# The proxy stands in between: whom it names as the caller is believed (proxy.py, Handler). Tornado believes anybody on
# this machine; where it counts, door.py does not.
c.JupyterHub.trusted_downstream_ips = ["127.0.0.1", "::1"]

# How many: beyond these the hub refuses in words, and the page tries again by itself (templates/error.html).
c.JupyterHub.active_server_limit = room["seats"]
c.JupyterHub.concurrent_spawn_limit = max(4, 2 * (os.cpu_count() or 1))
c.JupyterHub.spawn_throttle_retry_range = (5, 15)  # seconds, as it says them
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
    # The front's page for the instructor, in the room's own address; it asks for a key of its own.
    {"name": "watch", "url": room["front"], "display": False},
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


c.JupyterHub.spawner_class = DeskSpawner
c.DeskSpawner.room = room
c.Spawner.args = [
    # A kernel without a sign of life is ended, at work or not, with or without a page that shows it.
    f"--MappingKernelManager.cull_idle_timeout={room['idle_seconds']}",
    f"--MappingKernelManager.cull_interval={min(60, room['idle_seconds'])}",
    "--MappingKernelManager.cull_busy=True",
    "--MappingKernelManager.cull_connected=True",
    *(["--allow-root"] if os.getuid() == 0 and not room["apart"] else []),
    # Not TCP: Jupyter picks a kernel's ports before the kernel opens them, and where a class begins at once another
    # desk may have them by then. It would start the kernel again with the same ports, and again. The sockets lie in
    # /tmp, which is each desk's own, for a Unix socket's path has 107 bytes at most.
    *(["--KernelManager.transport=ipc"] if room["apart"] else []),
]
c.Spawner.default_url = "/lab/tree/notebooks/00_start_here.ipynb"
c.Spawner.environment = {
    "PATH": f"{python.parent}{os.pathsep}{os.defpath}",
    "LANG": "C.UTF-8",
    "JUPYTER_CONFIG_PATH": os.pathsep.join([str(here / "desk"), str(here.parent / "jupyter")]),
    "SERVEBOOK_CACHE_DIR": room["cache_dir"],
    "SERVEBOOK_ENGINE_URL": room["front"],
    "SERVEBOOK_MODEL": room["model"],
    "SERVEBOOK_SERVED_NAME": room["served_name"],
    "SERVEBOOK_JUDGE_APART": "1",  # checks are made by a process of its own
    **({"JUPYTER_RUNTIME_DIR": "/tmp/jupyter"} if room["apart"] else {}),
}
