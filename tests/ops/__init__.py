"""The pure tensor functions, a test file for each file of `whet.ops`; every number comes from outside the code."""
