"""Virtual tokens before a text, and the masks, caches and positions of a text model."""
