"""What every part stands on: places by path or URI, random streams, schedules, images."""
