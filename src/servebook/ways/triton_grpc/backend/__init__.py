"""Triton Inference Server with a `vllm` backend of our own: `python -m servebook.ways.triton_grpc.backend`."""
