"""The methods as values: every number comes from outside the code."""
