"""Models of flax.nnx."""
