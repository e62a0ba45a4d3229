"""Plots and HTML reports made from run folders, which are only read."""
