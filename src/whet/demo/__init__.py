"""The demo: the whole recipe on a little world, through the verbs that every user calls."""
