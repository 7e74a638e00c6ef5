"""What runs on a GPU: kernels made of an optimizer's own step, and those that move and add."""
