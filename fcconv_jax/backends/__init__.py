"""Compilers and devices: what XLA makes of a program there, and what that costs."""
