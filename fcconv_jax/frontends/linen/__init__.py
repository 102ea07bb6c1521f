"""Models of flax.linen."""
