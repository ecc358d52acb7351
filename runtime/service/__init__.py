"""The policy on another computer: an HTTP server for the GPU's side and a client for the robot's."""
