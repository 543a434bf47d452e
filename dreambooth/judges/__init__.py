"""Judges: frozen encoders that score pictures. Every score names the judge that gave it."""
