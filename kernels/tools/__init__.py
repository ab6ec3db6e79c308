"""Benchmarks, compile check and the GPU session of the kernels."""
