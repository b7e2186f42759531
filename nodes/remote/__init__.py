"""Nodes, page and account of wiro.ai."""
