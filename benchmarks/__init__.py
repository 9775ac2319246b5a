"""Benchmarks: speed of the model at the 7B sizes."""
