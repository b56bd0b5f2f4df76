"""Two things that vLLM could do faster on a CPU: normalize, and clear its KV cache.

vLLM loads this into each of its processes, as a plugin (`vllm.general_plugins` in pyproject.toml).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from servebook.launch.processes import small_pages

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
        clear_cache_in_small_pages()


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
    import torch

    fits = norm.impls["vllm_c"].supports_args

    @wraps(norm.impls["native"].impl_fn)
    def fits_here(*args: Any) -> bool:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        return fits(*args) and all(
            tensor.dtype == tensors[0].dtype and tensor.is_contiguous() and tensor.shape[-1] % VECTOR == 0
            for tensor in tensors
        )

    return fits_here


def clear_cache_in_small_pages() -> None:
    """Let the KV cache have small pages; all else has large ones (`arguments.py`).

    A virtual machine gives free memory back to its host, in large pieces. Measured on one (2 cores, Intel Xeon): to
    clear 1 GiB takes 4 s in large pages and 0.5 s in small ones, which come from the smaller pieces that it has kept.
    """
    from vllm.v1.worker.cpu_worker import CPUWorker

    initialize = CPUWorker.initialize_from_config

    @wraps(initialize)
    def initialize_small(*args: Any, **options: Any) -> None:
        with small_pages():
            initialize(*args, **options)

    CPUWorker.initialize_from_config = initialize_small
