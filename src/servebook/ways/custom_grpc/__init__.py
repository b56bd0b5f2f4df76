"""Chapter 04: a gRPC service of our own, `llm.v1.LLMService`: server, clients, and the steps from the obvious mistake."""
