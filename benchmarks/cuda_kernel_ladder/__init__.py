"""Four CUDA kernels of the weighted cross-entropy, from naive to rows in registers, and the tools that count them."""
