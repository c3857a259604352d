"""The objective as pure tensor functions."""
