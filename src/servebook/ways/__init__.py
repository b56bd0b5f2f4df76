"""What is taught: one folder for each way to serve a model, named by its chapter's stem; none imports another.

What two ways share stands beside them: `metrics.py`, and `v2/` for Triton and KServe.
"""
