"""Chapter 10: replicas of vLLM behind its router."""
