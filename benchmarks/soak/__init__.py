"""`make soak`: a small training under random faults, counted. See docs/reliability.md."""
