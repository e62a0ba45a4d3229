"""Build and start runs from recipes or Python objects."""
