"""Models as people have them: one room for each framework."""
