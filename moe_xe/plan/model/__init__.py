"""The host's models of device and kernel: records, the cost of a launch, the order of its tiles."""
