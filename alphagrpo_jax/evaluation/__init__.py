"""Evaluation on held-out prompts: task by task, with fixed keys."""
