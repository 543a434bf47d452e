"""The replica that draws: its scheduler, pipeline and caches of weights."""
