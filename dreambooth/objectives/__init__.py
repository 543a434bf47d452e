"""Objectives: what a network learns of noisy images, and the loss of DreamBooth."""
