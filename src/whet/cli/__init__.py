"""The door: recipes, verbs and the command line."""
