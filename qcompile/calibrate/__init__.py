"""Choosing codes and scales with the help of activations."""
