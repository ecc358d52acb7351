"""Latency, memory and roofline of a bundle, and the eager-PyTorch baseline that it is measured against."""
