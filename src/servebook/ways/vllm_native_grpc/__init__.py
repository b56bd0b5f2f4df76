"""Chapter 07: a client of vLLM's own gRPC server."""
