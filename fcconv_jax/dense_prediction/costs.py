"""What sharing has to save, and what it costs."""

# Sharing an operation has to save this much, for what it costs to rearrange.
WORTH = 1.1
# Sharing a function has to save this much of its arithmetic.
WORTH_WHOLE = 1.5
# A further pass costs this many floating point operations: some 0.2 ms.
PASS = 2e7
