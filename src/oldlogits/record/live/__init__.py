"""A run in the terminal: the view while it goes on, the panel that ends it."""
