"""Measuring: what a bundle, an operator and a training step cost on this machine."""
