"""The diffusion process of one token and its samplers, as pure functions on tensors."""
