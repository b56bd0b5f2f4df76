"""Our own gRPC server, `llm.v1.LLMService`: `python -m servebook.ways.custom_grpc.server`. Begin with `servicer.py`."""
