"""Weights between devices, streaming them, and what is done when memory runs out."""
