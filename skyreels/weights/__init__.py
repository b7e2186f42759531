"""Files of weights: what a file is, which tensor goes where, how it is loaded."""
