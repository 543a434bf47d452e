"""The Ray jobs: `personalize.py` and its stages, each of which can be run alone from plain values and a store."""
