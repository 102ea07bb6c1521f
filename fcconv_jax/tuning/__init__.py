"""Finds by measuring which layers to convert, how to run them, with which options."""
