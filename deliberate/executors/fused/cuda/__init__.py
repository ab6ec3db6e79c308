"""The fused executor on a CUDA device: custom ops, graphs, decisions left on the device."""
