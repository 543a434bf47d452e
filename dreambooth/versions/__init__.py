"""Version forms: what a version holds, and how it is saved, loaded and drawn with."""
