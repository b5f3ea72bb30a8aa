"""The inference server: one verified model package behind the Open Inference Protocol v2."""
