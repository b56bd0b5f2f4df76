"""Where settings come from, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from servebook import settings as module
from servebook.errors import ServebookError
from servebook.settings import Settings, is_loopback, load_settings, settings_file


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No variables of the person who runs the tests, and a folder without `servebook.toml`."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"SERVEBOOK_{name.upper()}", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_defaults() -> None:
    settings = load_settings()
    assert (settings.model, settings.model_name) == ("bundled", "smollm2")
    assert settings.host == "127.0.0.1"
    assert settings.key is None
    assert settings.port("vllm", "http") == 8000
    assert settings.port("vllm-grpc", "grpc") == 50052


def test_the_documented_default_ports() -> None:
    ports = {name: load_settings().model_dump()[name] for name in Settings.model_fields if name.endswith("_port")}
    assert ports == {
        "vllm_http_port": 8000,
        "triton_grpc_port": 8001,
        "triton_metrics_port": 8002,
        "triton_http_port": 8003,
        "grpc_grpc_port": 50051,
        "grpc_metrics_port": 9051,
        "gateway_http_port": 8080,
        "kserve_grpc_port": 8085,
        "kserve_http_port": 8086,
        "vllm_grpc_grpc_port": 50052,
        "vllm_rs_http_port": 8010,
        "vllm_rs_grpc_port": 50053,
        "router_http_port": 8090,
        "router_metrics_port": 8091,
        "front_http_port": 8095,
        "hub_http_port": 8100,
        "hub_routes_port": 8101,
        "hub_api_port": 8102,
    }


def test_order_parameters_environment_file_default(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / "servebook.toml").write_text('max_model_len = 100\nmodel = "a/b"\nkv_cache_gib = 3\n')
    monkeypatch.setenv("SERVEBOOK_MAX_MODEL_LEN", "200")
    monkeypatch.setenv("SERVEBOOK_KV_CACHE_GIB", "")  # empty is as if not set
    settings = load_settings(model="", engine_url=None)
    assert (settings.max_model_len, settings.model, settings.kv_cache_gib) == (200, "a/b", 3)
    assert load_settings(max_model_len=300).max_model_len == 300


def test_the_file_is_found_from_a_notebooks_folder(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / "servebook.toml").write_text("max_model_len = 100\n")
    inner = bare / "labs/01_openai_rest"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert settings_file() == bare / "servebook.toml"
    assert load_settings().max_model_len == 100


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"max_model_len": "many"}, "SERVEBOOK_MAX_MODEL_LEN"),
        ({"max_model_len": 1}, "SERVEBOOK_MAX_MODEL_LEN"),
        ({"device": "tpu"}, "SERVEBOOK_DEVICE"),
        ({"engine_url": "gpu-box:8000"}, "http://"),
        ({"engine_args": "--a 'b"}, "SERVEBOOK_ENGINE_ARGS"),
        ({"vllm_http_port": 70000}, "SERVEBOOK_VLLM_HTTP_PORT"),
        ({"host": "0.0.0.0"}, "SERVEBOOK_API_KEY"),
        ({"host": "::"}, "SERVEBOOK_API_KEY"),
        ({"host": "gpu-box"}, "SERVEBOOK_API_KEY"),
        ({"modle": "x"}, "SERVEBOOK_MODLE"),
    ],
)
def test_what_does_not_fit_is_named(overrides: dict[str, object], says: str) -> None:
    with pytest.raises(ServebookError, match=says):
        load_settings(**overrides)


@pytest.mark.parametrize(
    ("text", "says"), [("model = \n", r"servebook\.toml cannot be read"), ("modle = 'x'\n", "SERVEBOOK_MODLE")]
)
def test_a_bad_file(bare: Path, text: str, says: str) -> None:
    (bare / "servebook.toml").write_text(text)
    with pytest.raises(ServebookError, match=says):
        load_settings()


def test_a_key_never_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(api_key="sk-secret", host="0.0.0.0")
    assert settings.key == "sk-secret"
    assert "sk-secret" not in f"{settings} {settings!r} {settings.model_dump()} {settings.model_dump_json()}"
    with pytest.raises(ServebookError) as caught:
        load_settings(api_key="sk-secret", max_model_len="many")
    assert "sk-secret" not in str(caught.value)


def test_engine_url_is_taken_as_people_write_it() -> None:
    assert load_settings(engine_url="http://gpu-box:8000/v1/").engine_url == "http://gpu-box:8000"


def test_folders_are_absolute(bare: Path) -> None:
    settings = load_settings(cache_dir="~/cache", state_dir="state")
    assert settings.cache_dir == Path.home() / "cache"
    assert settings.state_dir == bare / "state"


@pytest.mark.parametrize(
    ("model", "name"), [("Qwen/Qwen3-0.6B", "qwen3-0.6b"), ("/models/Mine", "mine"), ("bundled", "smollm2")]
)
def test_model_name(model: str, name: str) -> None:
    assert load_settings(model=model).model_name == name
    assert load_settings(model=model, served_name="other").model_name == "other"


@pytest.mark.parametrize(
    ("device", "driver", "vllm", "on_gpu"),
    [
        ("auto", True, "0.32.0", True),
        ("auto", True, "0.32.0+cpu", False),
        ("auto", False, "0.32.0", False),
        ("gpu", False, "0.32.0", True),
        ("cpu", True, "0.32.0", False),
    ],
)
def test_on_gpu(monkeypatch: pytest.MonkeyPatch, device: str, driver: bool, vllm: str, on_gpu: bool) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi" if driver else None)
    monkeypatch.setattr(module, "installed_vllm", lambda: vllm)
    assert load_settings(device=device).on_gpu is on_gpu


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)],
)
def test_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
