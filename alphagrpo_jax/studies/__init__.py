"""Studies: measurements of models, rewards and runs, each a resumable script."""
