"""How large must it be? Weights, KV cache, how many requests fit; with fewer bits, and over several GPUs.

For decoders whose layers all attend to the whole text, with one key and one value for each head (MHA), for a group of
heads (GQA) or for all (MQA): Llama, Qwen, SmolLM. Where a model compresses them (MLA), slides a window or keeps a state
instead, it needs less, and vLLM reckons layer by layer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

from servebook.errors import ModelError

GIB = 2**30
HEADER_BYTES = 8
"""A safetensors file begins with the length of its header, in so many bytes: the format's own page, at
https://huggingface.co/docs/safetensors."""


@dataclass(frozen=True)
class Shape:
    """What the size depends on: `layers`, key and value heads (`kv_heads`) of `head_dim` numbers each, and how many
    numbers the weights are (`parameters`)."""

    layers: int
    kv_heads: int
    head_dim: int
    parameters: int


@dataclass(frozen=True)
class Fit:
    """What fits on each GPU, in bytes, and so many tokens, or requests of the full length, at once in all."""

    weights: int
    cache: int
    tokens: int
    requests: int


def shape_of(model: Path) -> Shape:
    """The shape of a model's folder: of its config.json, and of the headers of its safetensors files.

    Raises:
        ModelError: the folder lacks one of them.
    """
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise ModelError(f"{model} has no config.json.", "Name the folder of a model.") from None
    heads = config["num_attention_heads"]
    return Shape(
        layers=config["num_hidden_layers"],
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        parameters=sum(prod(tensor["shape"]) for tensor in tensors(model).values()),
    )


def tensors(model: Path) -> dict[str, dict[str, Any]]:
    """Every tensor of the folder's safetensors files by name, with its `dtype` and `shape`; no weight is read.

    Raises:
        ModelError: there is no such file.
    """
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(HEADER_BYTES), "little")))
        found |= {name: tensor for name, tensor in header.items() if name != "__metadata__"}
    if not found:
        raise ModelError(f"{model} has no safetensors file.", "Name the folder of a model with its weights.")
    return found


def weight_bytes(shape: Shape, bits: float, gpus: int = 1) -> int:
    """The weights on each GPU. Quantized ones take a little more: scales, and layers that stay at 16 bits."""
    return ceil(shape.parameters * bits / 8 / gpus)


def kv_bytes_per_token(shape: Shape, bits: float, gpus: int = 1) -> int:
    """What one token leaves in the cache of each GPU: a key and a value, in every layer, for every head that it has.

    A head is never cut: with more GPUs than heads, each keeps one, and some keep the same (vLLM's
    `ModelConfig.get_num_kv_heads`).
    """
    heads = max(1, shape.kv_heads // gpus)
    return ceil(2 * shape.layers * heads * shape.head_dim * bits / 8)


def blocks(shape: Shape, cache_bytes: int, block_size: int, bits: float, gpus: int = 1) -> int:
    """How many blocks of `block_size` tokens fit into `cache_bytes` of each GPU."""
    return cache_bytes // (block_size * kv_bytes_per_token(shape, bits, gpus))


def fit(
    shape: Shape,
    gpu_bytes: int,
    length: int,
    *,
    weight_bits: float = 16,
    kv_bits: float = 16,
    gpus: int = 1,
    usable: float = 0.92,
    runtime: int = 2 * GIB,
    block_size: int = 16,
) -> Fit:
    """What fits on `gpus` of `gpu_bytes` each, for requests of `length` tokens (prompt and answer).

    `usable` is vLLM's `--gpu-memory-utilization` with its default; `runtime` is for what is neither weights nor cache
    (CUDA's context, graphs, activations): an estimate, larger for large models and long steps.
    """
    weights = weight_bytes(shape, weight_bits, gpus)
    cache = max(0, int(usable * gpu_bytes) - weights - runtime)
    count = blocks(shape, cache, block_size, kv_bits, gpus)
    return Fit(weights, cache, count * block_size, count // ceil(length / block_size))
