"""Generation with vLLM: engines started by this process, and servers."""
