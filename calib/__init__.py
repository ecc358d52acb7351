"""INT8: which frames to calibrate on, ranges, exact smoothing, Q/DQ, and precision chosen by action error."""
