"""Known answers: problems small enough to enumerate, where every method's exact end is computed and must be reached."""
