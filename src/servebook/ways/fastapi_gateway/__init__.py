"""Chapter 05: a FastAPI gateway in front of vLLM, and the steps to it from the article's gateway that blocks."""
