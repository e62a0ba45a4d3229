"""Models of transformers and peft: loading, roles, and computing columns from hidden states."""
