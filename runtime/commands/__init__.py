"""Where velocity commands go: one small protocol, one module for each way to a robot."""
