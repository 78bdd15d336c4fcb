"""Training: the run's config, the step, the loop and its checkpoints."""
