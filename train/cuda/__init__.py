"""The CUDA kernels of the loss: source, runtime compilation, launch."""
