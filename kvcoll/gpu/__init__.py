"""GPUs behind ports: what a device, a stream, a kernel and NCCL must do, and how CuPy does it."""
