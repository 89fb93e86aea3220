"""Sums of networks' weights in PyTorch, with nothing of the study in it."""
