"""Traces of programs: reading and rewriting them."""
