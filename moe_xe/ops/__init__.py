"""One file for each public operation: check the arguments, plan, launch."""
