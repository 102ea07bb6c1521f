"""Words for people: errors, install lines, progress, and the base of reports."""
