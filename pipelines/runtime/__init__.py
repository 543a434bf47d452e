"""Runtime: Ray's start, pools of actors, and the console."""
