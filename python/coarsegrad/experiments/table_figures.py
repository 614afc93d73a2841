"""The figures of a table of runs."""
