"""Who learns: every number comes from outside the code."""
