"""The GPUs that an engine would see, read through NVML, the library of NVIDIA's driver; no CUDA context is made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pynvml

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """One GPU; memory in bytes, `driver` such as "580.82.07".

    `holders` maps each process that holds memory of it to how much; None where the driver does not say.
    """

    uuid: str
    name: str
    driver: str
    total: int
    free: int
    holders: Mapping[int, int | None]

    def share(self, gib: float) -> float:
        """`gib` as the part of the whole card that vLLM's `--gpu-memory-utilization` means: above 0, at most 1."""
        return min(1.0, max(0.0001, round(gib * GIB / self.total, 4)))


def cards() -> list[Card]:
    """The GPUs of CUDA_VISIBLE_DEVICES, the one that a new engine takes first; [] where no driver answers."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        return [_card(handle, driver) for handle in _visible()]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _visible() -> list[Any]:
    """NVML's handles by CUDA_VISIBLE_DEVICES: numbers or beginnings of ids; as in CUDA, a wrong one ends the list."""
    every = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    if (wanted := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return _slices(every)
    handles = []
    for word in map(str.strip, wanted.split(",")):
        if word.startswith("MIG-"):
            found = [pynvml.nvmlDeviceGetHandleByUUID(word)]
        elif word.startswith("GPU-"):
            found = _slices([handle for handle in every if pynvml.nvmlDeviceGetUUID(handle).startswith(word)])
        else:
            found = _slices(every[int(word) : int(word) + 1]) if word.isdigit() else []
        if not found:
            break
        handles.append(found[0])
    return handles


def _slices(whole: list[Any]) -> list[Any]:
    """These cards; in place of one that is cut (MIG) its slices, one of which is all that a program gets of it."""
    found = []
    for card in whole:
        try:
            cut = pynvml.nvmlDeviceGetMigMode(card)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
        except pynvml.NVMLError:  # it cannot be cut
            cut = False
        for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(card) if cut else 0):
            with suppress(pynvml.NVMLError):  # no slice has this number
                found.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(card, index))
        found += [] if cut else [card]
    return found


def _card(handle: Any, driver: str) -> Card:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:  # not every card says
        processes = []
    return Card(
        uuid=pynvml.nvmlDeviceGetUUID(handle),
        name=pynvml.nvmlDeviceGetName(handle),
        driver=driver,
        total=memory.total,
        free=memory.free,
        holders={each.pid: each.usedGpuMemory for each in processes},
    )
