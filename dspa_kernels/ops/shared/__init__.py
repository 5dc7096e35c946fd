"""What several ops share: formulas of the references, tiles, ranks and grids of the Triton kernels."""
