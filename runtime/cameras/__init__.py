"""Where frames come from: one small protocol, one module for each kind of camera."""
