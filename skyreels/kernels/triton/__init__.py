"""Triton kernels; imported inside functions only, where Triton is installed."""
