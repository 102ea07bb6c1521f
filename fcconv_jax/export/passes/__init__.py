"""Passes over a graph, before a writer takes it."""
