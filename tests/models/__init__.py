"""The room of transformers and peft: every number comes from outside the code."""
