"""Sampling loops over the policy: texts, images and whole trajectories."""
