"""`python -m servebook.ways.kserve.server --host H --http-port N --grpc-port N <vLLM engine arguments>`."""

from __future__ import annotations

import argparse
import sys

from servebook.numbers import port


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="servebook.ways.kserve.server", allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--http-port", type=port, default=8086)
    parser.add_argument("--grpc-port", type=port, default=8085)
    ours, engine_words = parser.parse_known_args(argv)
    # KServe's import parses sys.argv for options of its own and would stop at vLLM's.
    sys.argv[1:] = []

    from vllm.v1.engine.async_llm import AsyncLLM

    from servebook.engine.arguments import engine_args
    from servebook.settings import TENSOR_MODEL_NAME
    from servebook.ways.kserve.server.predictor import Predictor
    from servebook.ways.kserve.server.server import serve

    engine = AsyncLLM.from_engine_args(engine_args(engine_words))
    try:
        serve(Predictor(TENSOR_MODEL_NAME, engine), ours.host, ours.http_port, ours.grpc_port)
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
