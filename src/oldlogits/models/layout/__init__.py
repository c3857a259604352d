"""Packed rows: what their tokens attend to, and how a decoder is let read them."""
