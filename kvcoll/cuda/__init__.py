"""The ports to GPUs as CuPy fills them."""
