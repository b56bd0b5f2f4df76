"""Our own gRPC server for vLLM, `llm.v1.LLMService`: `python -m servebook.grpc_server`. Begin with `servicer.py`."""
