"""The figures that need a GPU: of which networks, in which slices, and what is claimed of them."""
