"""Workloads, timing and comparisons with peers; nothing of the library imports this."""
