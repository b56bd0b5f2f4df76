"""A number on a command line that cannot be meant is refused by the parser, before anything starts."""

from __future__ import annotations

import runpy
import sys

import pytest

from servebook.numbers import number

GRPC, TRITON, KSERVE = (
    f"servebook.ways.{name}" for name in ("custom_grpc.server", "triton_grpc.backend", "kserve.server")
)
GATEWAY, FRONT, HUB = "servebook.ways.fastapi_gateway.server", "servebook.room", "servebook.room.hub"
IDENTITY = "servebook.bench.identity_kserve"
PORTS = {
    GRPC: ("grpc", "metrics"),
    TRITON: ("grpc", "metrics", "http"),
    KSERVE: ("grpc", "http"),
    GATEWAY: ("http",),
    FRONT: ("http",),
    HUB: ("http", "routes", "api"),
    IDENTITY: ("grpc", "http"),
}
OTHERS = {
    GRPC: (
        ("max-calls", "0"),
        ("max-calls", "1.5"),
        ("max-calls", "1" + "0" * 400),
        ("fronts", "0"),
        ("fronts", "65"),
        ("grace", "-1"),
        ("grace", "nan"),
    ),
    GATEWAY: (("max-concurrent", "0"),),
    FRONT: (
        *((name, "0") for name in ("places", "learner-places", "requests-per-minute", "tokens-per-minute")),
        ("drain-seconds", "0"),
        ("drain-seconds", "inf"),
    ),
}
REFUSED = [
    *((module, f"--{kind}-port", word) for module, kinds in PORTS.items() for kind in kinds for word in ("0", "65536")),
    *((module, f"--{name}", word) for module, options in OTHERS.items() for name, word in options),
]


@pytest.mark.parametrize(("module", "option", "word"), REFUSED)
def test_a_number_out_of_range_is_refused(
    module: str, option: str, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, option, word])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    assert end.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert option in said
    assert any(words in said for words in (f"{word} is not a", "should be")), said


def test_what_a_number_must_be_is_said() -> None:
    assert [number(int, 1)("3"), number(float, 0, 9)("0.5")] == [3, 0.5]
    for read, word, said in (
        (number(int, 1), "0", "0 is not a whole number of at least 1"),
        (number(int, 1, 65535), "1e3", "1e3 is not a whole number from 1 to 65535"),
        (number(float, 0, 3600), "inf", "inf is not a number from 0 to 3600"),
    ):
        with pytest.raises(Exception, match=f"^{said}$"):
            read(word)
