"""The catalog of models, and the index of JSON files behind it."""
