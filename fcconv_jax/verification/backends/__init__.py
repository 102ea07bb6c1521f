"""Backends that a program can be run on, compiled for, or lowered to."""
