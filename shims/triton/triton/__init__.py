"""Says what is true of the CPU environment: OpenAI's Triton compiler is not installed."""

raise ModuleNotFoundError(
    "No module named 'triton' (the GPU compiler is not part of the CPU environment)", name="triton"
)
