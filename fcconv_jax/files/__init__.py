"""Files: one atomic install for every writer, and strict JSON."""
