"""Lowers a traced program to the graph that every writer takes."""
