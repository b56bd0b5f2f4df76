"""What is taught: one folder for each way to serve a model, named by its chapter's stem; none imports another.

What several ways share stands beside them: `limits.py`, `refusals.py`, `asgi.py`, `metrics.py`, and `v2/` for Triton
and KServe.
"""
