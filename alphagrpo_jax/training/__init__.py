"""The parts of a training run: context, options, setup, jitted steps, gradient, run folder."""
