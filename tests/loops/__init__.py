"""The loops over real tiny models: every number comes from outside the code."""
