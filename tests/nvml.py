"""NVML's C interface over cards of this file's making: what `pynvml` calls where there is a driver."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import pynvml
import pytest

from servebook.engine.gpu import GIB

SUCCESS, NOT_FOUND, INSUFFICIENT_SIZE = 0, 6, 7


@dataclass
class FakeCard:
    """Sizes in GiB; `holders` maps processes to what they hold, None for "not told"."""

    total: float
    free: float
    name: str = "NVIDIA L4"
    uuid: str = "GPU-1111aaaa"
    holders: dict[int, float | None] = field(default_factory=dict)
    slices: dict[int, FakeCard] | None = None
    """By their numbers, where it is cut (MIG)."""


class FakeNvml:
    """The functions of `libnvidia-ml.so.1` that are used here, with the pointers that they fill."""

    def __init__(self, *cards: FakeCard) -> None:
        self.cards = cards
        self.handles: dict[int, FakeCard] = {}

    def nvmlInitWithFlags(self, _: Any) -> int:
        return SUCCESS

    def nvmlShutdown(self) -> int:
        return SUCCESS

    def nvmlSystemGetDriverVersion(self, text: Any, _: Any) -> int:
        text.value = b"580.65.06"
        return SUCCESS

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = len(self.cards)
        return SUCCESS

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        handle._obj.contents = type(handle._obj)._type_()
        self.handles[_address(handle._obj)] = self.cards[index.value]
        return SUCCESS

    def nvmlDeviceGetMigMode(self, handle: Any, now: Any, later: Any) -> int:
        now._obj.value = later._obj.value = int(self._of(handle).slices is not None)
        return SUCCESS

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any, count: Any) -> int:
        count._obj.value = 7
        return SUCCESS

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: Any, found: Any) -> int:
        slices = self._of(handle).slices or {}
        if index.value not in slices:
            return NOT_FOUND
        found._obj.contents = type(found._obj)._type_()
        self.handles[_address(found._obj)] = slices[index.value]
        return SUCCESS

    def nvmlDeviceGetUUID(self, handle: Any, text: Any, _: Any) -> int:
        text.value = self._of(handle).uuid.encode()
        return SUCCESS

    def nvmlDeviceGetName(self, handle: Any, text: Any, _: Any) -> int:
        text.value = self._of(handle).name.encode()
        return SUCCESS

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        card = self._of(handle)
        memory._obj.total, memory._obj.free = round(card.total * GIB), round(card.free * GIB)
        memory._obj.used = memory._obj.total - memory._obj.free
        return SUCCESS

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle: Any, count: Any, entries: Any) -> int:
        holders = self._of(handle).holders
        room, count._obj.value = count._obj.value, len(holders)
        if len(holders) > room:
            return INSUFFICIENT_SIZE
        for entry, (pid, held) in zip(entries or (), holders.items(), strict=False):
            entry.pid = pid
            entry.usedGpuMemory = 2**64 - 1 if held is None else round(held * GIB)
        return SUCCESS

    def _of(self, handle: Any) -> FakeCard:
        return self.handles[_address(handle)]


def _address(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def install(monkeypatch: pytest.MonkeyPatch, *cards: FakeCard) -> None:
    """For the length of a test, `pynvml` finds a driver with these cards."""
    monkeypatch.setattr(pynvml, "nvmlLib", FakeNvml(*cards))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
