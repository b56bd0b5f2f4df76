"""Chapter 04: a gRPC service of our own, `llm.v1.LLMService`: from the obvious mistake to the server, and clients."""
