"""Images: where they come from, what they go through, in which order they are seen; and what is wrong with them."""
