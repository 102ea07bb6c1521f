"""Proof that a conversion changed nothing: certificates, bounds, gradients, census."""
