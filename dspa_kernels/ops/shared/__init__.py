"""Tiles, ranks and grids of the Triton kernels, shared by several ops."""
