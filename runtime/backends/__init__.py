"""Ways to execute a stage: ONNX Runtime, and a fake for tests of what stands above them."""
