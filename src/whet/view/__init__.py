"""Reads run folders and shows them; changes nothing in them."""
