"""Two things that vLLM could do faster on a CPU: normalize, and get memory for its KV cache.

vLLM loads this into each of its processes, as a plugin (`vllm.general_plugins` in pyproject.toml).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from mmap import MADV_NOHUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from vllm.ir.op import IrOp

OURS = "servebook_cpu"
VECTOR = 16
"""vLLM's kernels for CPUs take whole vectors, of so many numbers at most (bfloat16 with AVX-512)."""


def register() -> None:
    """Make both faster; on a GPU neither is slow."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        normalize_at_once()
        leave_cache_untouched()


def normalize_at_once() -> None:
    """Where nothing is compiled, use the RMSNorm of vLLM's own library, which it leaves to GPUs.

    On a CPU it takes a dozen small operations of torch instead, 61 times a token. Measured (2 cores, Intel Xeon): a
    token in 25 ms and not 30.
    """
    import vllm.kernels  # registers them
    from vllm.config import CompilationMode
    from vllm.config.kernel import IrOpPriorityConfig
    from vllm.platforms.cpu import CpuPlatform

    norms = vllm.ir.ops.rms_norm, vllm.ir.ops.fused_add_rms_norm
    for norm in norms:
        kernel = norm.impls["vllm_c"]
        norm.register_impl(OURS, supports_args=in_whole_rows(norm), inplace=kernel.inplace)(kernel.impl_fn)

    def priority(_: type[CpuPlatform], config: Any) -> IrOpPriorityConfig:
        eager = config.compilation_config.mode == CompilationMode.NONE
        ours = {norm.name: [OURS, "native"] for norm in norms} if eager else {}
        return IrOpPriorityConfig.with_default(["native"], **ours)

    CpuPlatform.get_default_ir_op_priority = classmethod(priority)


def in_whole_rows(norm: IrOp) -> Callable[..., bool]:
    """Whether the kernel fits, and the tensors lie as it reads them: of one type, row after row, in whole vectors."""
    fits = norm.impls["vllm_c"].supports_args

    @wraps(norm.impls["native"].impl_fn)
    def fits_here(*args: Any) -> bool:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        return fits(*args) and all(
            tensor.dtype == tensors[0].dtype and tensor.is_contiguous() and tensor.shape[-1] % VECTOR == 0
            for tensor in tensors
        )

    return fits_here


def leave_cache_untouched() -> None:
    """Give the KV cache memory that is zero because it is new, in place of memory that is written full of zeros.

    The kernel then finds each page when it is first used, and an engine that has been asked little takes little memory.
    Measured on two virtual machines with 2 cores, for 1 GiB: writing it takes 2.6 s on an AMD EPYC, on an Intel Xeon
    0.5 s, and 4 s in large pages, which a virtual machine gives back to its host. So it has small ones; all else has
    large ones (`arguments.py`).
    """
    from vllm.v1.worker.cpu_worker import CPUWorker

    initialize = CPUWorker.initialize_from_config

    @wraps(initialize)
    def initialize_untouched(*args: Any, **options: Any) -> None:
        with NewMemory():
            initialize(*args, **options)

    CPUWorker.initialize_from_config = initialize_untouched


class NewMemory(TorchFunctionMode):  # type: ignore[misc]
    """Where bytes of zeros are asked for meanwhile, in one dimension, they come from the kernel and are not written."""

    def __torch_function__(
        self, func: Callable[..., Any], _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        match func, args, kwargs:
            case torch.zeros, (int(size),), {"dtype": torch.int8, "device": torch.device(type="cpu")} if size:
                memory = mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS)
                with suppress(OSError):  # a kernel without large pages
                    memory.madvise(MADV_NOHUGEPAGE)
                return torch.frombuffer(memory, dtype=torch.int8)
        return func(*args, **kwargs or {})
