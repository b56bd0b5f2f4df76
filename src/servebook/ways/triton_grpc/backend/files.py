"""The model's files: `model.json` holds vLLM's engine arguments, `multi_lora.json` names adapters."""

from __future__ import annotations

import dataclasses
import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs

ENGINE_ARGS = "model.json"
LORAS = "multi_lora.json"
NAMES = {"model", "served_model_name", "tokenizer", "revision", "code_revision", "tokenizer_revision"}
"""Engine arguments that name something: a folder may be called `405`, and so the model is."""


class ModelFilesError(ValueError):
    """A file of the model's version folder is missing or does not fit; the message names file and key."""


def read_engine_args(folder: Path) -> AsyncEngineArgs:
    """vLLM's engine arguments from `folder`/model.json, its keys being the fields of AsyncEngineArgs.

    Raises:
        ModelFilesError: no such file, not a JSON object, or a key that this vLLM does not know.
    """
    values = _read_object(folder / ENGINE_ARGS)

    from vllm import __version__
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for key in values.keys() - known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ModelFilesError(f"{ENGINE_ARGS}: vLLM {__version__} has no engine argument {key!r}{hint}")
    # An option that is an object is a config in vLLM, as its own parser makes it.
    makers = {field.name: field.default_factory for field in dataclasses.fields(AsyncEngineArgs)}
    for key, value in values.items():
        if isinstance(value, dict) and callable(make := makers[key]) and dataclasses.is_dataclass(make()):
            values[key] = type(make())(**value)
    return AsyncEngineArgs(**values)


def read_loras(folder: Path, engine_args: AsyncEngineArgs) -> dict[str, str] | None:
    """Adapters by name, as paths; None where model.json does not enable LoRA.

    Raises:
        ModelFilesError: LoRA is enabled and multi_lora.json is missing or no JSON object.
    """
    return _read_object(folder / LORAS) if engine_args.enable_lora else None


def engine_words_as_json(words: list[str]) -> dict[str, Any]:
    """vLLM's command-line words as keys and values for model.json.

    `--max-model-len 2048` becomes `"max_model_len": 2048`, a word alone `true`, `--no-…` `false`. Values are
    read as JSON where they are JSON, and as strings elsewhere; those of NAMES always are strings. What only vLLM's
    command line reads, such as `4k` for a number and `--compilation-config.mode 3` for a part of an object, is to be
    written out.

    Raises:
        ModelFilesError: a short option such as `-tp`, which has no key of its own.
    """
    values: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, given, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if not given and name.startswith("no_"):
                values[name.removeprefix("no_")] = False
            else:
                values[name] = _value(name, value) if given else True
        elif not name or (word.startswith("-") and not word[1:2].isdigit()):
            raise ModelFilesError(f"{word} has no key in {ENGINE_ARGS}: write the long option (`--…`)")
        elif values[name] is True:
            values[name] = _value(name, word)
        else:
            before = values[name] if isinstance(values[name], list) else [values[name]]
            values[name] = [*before, _value(name, word)]
    return values


def _value(name: str, word: str) -> Any:
    if name in NAMES:
        return word
    try:
        return json.loads(word)
    except ValueError:
        return word


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFilesError(f"{path.name} is missing: the engine's arguments are read from there") from None
    except ValueError as error:
        raise ModelFilesError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ModelFilesError(f"{path.name} must hold a JSON object, not a {type(values).__name__}")
    return values
