"""Sampling: how images are drawn, and the sets of class-prior images."""
