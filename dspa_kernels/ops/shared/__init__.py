"""What several ops share: tiles, ranks and grids of the Triton kernels."""
