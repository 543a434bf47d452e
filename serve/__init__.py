"""Serving: published subjects behind an HTTP API on Ray Serve."""
