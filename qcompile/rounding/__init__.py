"""Choosing codes, scales and factors with the help of activations."""
