"""Nodes that run the model on this machine."""
