"""Chapter 07: clients of vLLM's own gRPC servers, the Rust front end (text) and the one in Python (token ids)."""
