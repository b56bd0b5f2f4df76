"""Experiments: designs that look right, run for real to see what becomes of them. Not to be imitated."""
