"""Chapter 03: Triton Inference Server with a vLLM backend, and its clients."""
