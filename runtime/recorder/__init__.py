"""The flight recorder: what the robot saw, decided and was told, on disk in a format that others read."""
