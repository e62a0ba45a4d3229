"""The demo: all training stages on a small synthetic data set, run with the public commands."""
