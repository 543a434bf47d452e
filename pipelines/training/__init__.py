"""Training: what one worker of a lane does."""
