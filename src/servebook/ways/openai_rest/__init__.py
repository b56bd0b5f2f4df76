"""Chapters 01 and 02: vLLM's OpenAI server, and the key that it asks for."""
