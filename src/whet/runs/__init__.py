"""Assembly: from a recipe, or from Python objects, to a run."""
