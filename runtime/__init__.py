"""From a bundle to actions on a robot. Never imports torch, transformers or onnx."""
