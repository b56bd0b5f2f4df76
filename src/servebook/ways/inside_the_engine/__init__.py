"""Chapter 11: what an engine does step by step, and how large it must be."""
