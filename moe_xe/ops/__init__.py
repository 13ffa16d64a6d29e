"""Public operations, a room for each family: check the arguments, plan, launch."""
