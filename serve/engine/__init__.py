"""The replica that draws images: its scheduler, pipeline and weight caches."""
