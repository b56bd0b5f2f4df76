"""Chapter 06: the Open Inference Protocol by KServe's ModelServer, and a client of it."""
