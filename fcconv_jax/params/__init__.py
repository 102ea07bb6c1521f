"""Trees of parameters in either form."""
