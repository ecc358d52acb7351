"""The policy as torch modules, and the checkpoints that hold it."""
