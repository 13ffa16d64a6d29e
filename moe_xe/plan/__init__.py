"""What to compile and how to launch it: plain values and pure functions; no tensors, no devices touched."""
