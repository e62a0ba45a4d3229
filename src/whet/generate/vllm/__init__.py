"""Generation with vLLM: engines that this process starts, and servers."""
