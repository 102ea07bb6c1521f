"""Functions of params and inputs: their trace, and the products in it."""
