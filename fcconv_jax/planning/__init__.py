"""Finds layers in a trace, and decides what each becomes."""
