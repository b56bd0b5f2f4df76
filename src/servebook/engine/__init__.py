"""The engine: vLLM's arguments on this machine, and the model that it loads."""
