"""What moe-xe doctor reports: the machine, the drivers, and whether each device computes."""
