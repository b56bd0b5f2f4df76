"""Chapter 05: a FastAPI gateway in front of vLLM, and the article's gateway that blocks."""
