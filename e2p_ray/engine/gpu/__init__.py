"""A pass over rows on a GPU: library products, and Triton kernels of our own for all that stands between them."""
