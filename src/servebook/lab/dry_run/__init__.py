"""Loads a Triton model repository for real, all but the engine."""
