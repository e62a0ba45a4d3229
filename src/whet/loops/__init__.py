"""The training loops and what they are made of: each reads from top to bottom."""
