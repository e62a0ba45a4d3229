"""Tests of the pure tensor functions, one file for each file of `whet.ops`; every number comes from outside the code."""
