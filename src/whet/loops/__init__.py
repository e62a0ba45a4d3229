"""Training loops, and their parts: group sources, self-checks, checkpoints, evaluation, and the run folder."""
