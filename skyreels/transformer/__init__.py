"""The transformer: its modules, attention, 8-bit linears, and where its weights are in a run."""
