"""What Triton and KServe share: the tensors of the Open Inference Protocol (V2) that carry a prompt and its answer."""
