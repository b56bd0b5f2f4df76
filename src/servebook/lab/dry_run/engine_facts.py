"""Says what vLLM makes of a model.json: one folder a line in, one JSON out.

`python -m servebook.lab.dry_run.engine_facts`
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def facts_of(version: Path) -> dict[str, Any]:
    """The engine's configuration, or {"refused": why} where the backend or vLLM does not take `version`/model.json."""
    from servebook.ways.triton_grpc.backend.files import read_engine_args

    try:
        config = read_engine_args(version).create_engine_config()
    except Exception as error:
        return {"refused": str(error)}
    return {
        "model": config.model_config.model,
        "max_model_len": config.model_config.max_model_len,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "enforce_eager": config.model_config.enforce_eager,
        "kv_cache_memory_bytes": config.cache_config.kv_cache_memory_bytes,
    }


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout

    import vllm.engine.arg_utils  # noqa: F401  # before the first question, which comes later

    for line in sys.stdin:
        print(json.dumps(facts_of(Path(line.rstrip("\n")))), file=answers, flush=True)


if __name__ == "__main__":
    main()
