"""What runs the layers: transformers' own modules, C++ kernels, Triton kernels in CUDA graphs."""
