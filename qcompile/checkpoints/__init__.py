"""Planes from the weights of quantized checkpoints, and back."""
