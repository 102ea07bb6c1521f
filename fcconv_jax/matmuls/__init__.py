"""Matmuls of an activation with a weight, wherever they are in a traced program."""
