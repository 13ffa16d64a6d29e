"""Configurations on Xe: all that there are, the rules that they obey, and those that the cost model prefers."""
