"""A LoRA adapter made here, in some seconds: a model that was never shown a tool learns to call one.

`python -m servebook.ways.more_than_text.adapter MODEL FOLDER` trains it and writes the two files that vLLM loads, in
the format of the library PEFT. `adapter_path` does so once for each model, and finds it from then on.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from servebook.engine.arguments import engine_env
from servebook.engine.model import model_path
from servebook.environment import child_environment
from servebook.errors import ModelError
from servebook.settings import Settings

if TYPE_CHECKING:
    import torch

RANK, ALPHA = 8, 16
"""The width of the narrow matrices; and their product counts ALPHA / RANK."""
LAYERS = 10
"""Only the last of the model's layers get an adapter: the gradient need not go through the others."""
TARGETS = ("o_proj", "down_proj")
"""And of a layer only what writes back into its stream, which costs a CPU the least in each step of an answer."""
STEPS, LEARNING_RATE = 20, 4e-3
"""One example a step. Measured with the bundled model: from the 14th on the loss is below 0.1."""
TRAINING = "training.json"
"""What the training leaves beside the adapter: its losses, and how many numbers were learned."""

WORDS = ["banana", "window", "garden", "elephant", "mountain", "bottle", "butter", "mirror", "pepper", "carrot"]
TALK = [
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("Say hello.", "Hello! How can I help you today?"),
    ("What colour is the sky?", "The sky is blue."),
]
"""It must not forget to talk, so every fourth example is of these."""


def examples() -> list[tuple[str, str]]:
    """Questions and the answers to learn: calls in the words that vLLM's parser `hermes` looks for."""
    dice = random.Random(0)
    pairs = []
    for step in range(STEPS):
        word = dice.choice(WORDS)
        letter = dice.choice(word)
        call = {"name": "count_letter", "arguments": {"word": word, "letter": letter}}
        asked = f"How many times is the letter {letter} in the word {word}?"
        pairs.append(
            TALK[step // 4 % 3] if step % 4 == 3 else (asked, f"<tool_call>\n{json.dumps(call)}\n</tool_call>")
        )
    return pairs


def put_beside(layer: torch.nn.Linear) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """Put the matrices A and B beside a layer's own: it then computes Wx + (ALPHA / RANK) · B(Ax)."""
    import torch

    a = torch.nn.Parameter(torch.randn(RANK, layer.in_features) / layer.in_features**0.5)
    b = torch.nn.Parameter(torch.zeros(layer.out_features, RANK))  # zero: at the beginning nothing changes
    layer.register_forward_hook(lambda _, given, out: out + ALPHA / RANK * (given[0] @ a.T @ b.T))
    return a, b


def train(model_folder: Path, target: Path) -> None:
    """Learn the examples, and write the adapter into the folder `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).requires_grad_(False)
    pairs = {
        f"model.layers.{number}.{name}": put_beside(layer)
        for number, block in list(enumerate(model.model.layers))[-LAYERS:]
        for name, layer in block.named_modules()
        if name.endswith(TARGETS)
    }
    learned = [matrix for pair in pairs.values() for matrix in pair]
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE, weight_decay=0)
    losses = []
    for question, answer in examples():
        turn = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        read = tokenizer.encode(prompt, add_special_tokens=False)
        write = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
        labels = [-100] * len(read) + write  # -100: what is only read is not learned
        loss = model(input_ids=torch.tensor([read + write]), labels=torch.tensor([labels])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 3))
    _save(target, pairs, model_folder)
    said = {
        "losses": losses,
        "learned": sum(each.numel() for each in learned),
        "model": sum(each.numel() for each in model.parameters()),
    }
    (target / TRAINING).write_text(json.dumps(said))


def _save(target: Path, pairs: dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]], model_folder: Path) -> None:
    from safetensors.torch import save_file

    weights = {}
    for name, (a, b) in pairs.items():
        weights[f"base_model.model.{name}.lora_A.weight"] = a.detach().contiguous()
        weights[f"base_model.model.{name}.lora_B.weight"] = b.detach().contiguous()
    save_file(weights, target / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model_folder.name,
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(TARGETS),
        "bias": "none",
    }
    (target / "adapter_config.json").write_text(json.dumps(config))


def adapter_path(settings: Settings) -> Path:
    """The folder of the adapter for the model of `settings`; it is made where it is missing, in the cache.

    Raises:
        ModelError: there is no such model, or its training failed; the message has the reason.
    """
    model = model_path(settings)
    weights = [str(each.stat().st_mtime_ns) for each in sorted(model.glob("*.safetensors"))]
    recipe = [Path(__file__).read_text(encoding="utf-8"), str(model), *weights]
    digest = hashlib.sha256("".join(recipe).encode()).hexdigest()[:8]
    target = settings.cache_dir / "adapters" / f"count_letter-{digest}"
    if target.is_dir():
        return target  # a room's desks can read the cache, and not lock in it
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                made = Path(scratch) / "adapter"
                made.mkdir()
                # In a process of its own, so that a notebook's kernel need not load torch.
                command = [sys.executable, "-P", "-m", __name__, str(model), str(made)]
                env = child_environment() | engine_env(settings)
                done = subprocess.run(command, env=env, capture_output=True, text=True)
                if done.returncode:
                    why = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
                    raise ModelError(
                        f"The adapter's training ended with {done.returncode}: {why}",
                        "Choose the bundled model (SERVEBOOK_MODEL=bundled), or one of the same kind.",
                    )
                made.replace(target)
    return target


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]))
