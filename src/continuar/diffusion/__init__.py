"""The per-token diffusion process: schedule, losses, posterior and samplers, as pure functions on tensors."""
