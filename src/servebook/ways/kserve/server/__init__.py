"""KServe's ModelServer with a vLLM engine as its predictor: `python -m servebook.ways.kserve.server`."""
