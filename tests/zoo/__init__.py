"""Every causal architecture of the installed transformers, tiny, against its own forward."""
