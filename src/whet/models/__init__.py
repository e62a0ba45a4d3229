"""The room that knows transformers and peft: loading, roles, and reading columns off hidden states."""
