"""The stages of the job, each of which runs alone."""
