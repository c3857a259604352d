"""Environments: the shape of a class, its tools and their schemas, and the parsers of tool calls."""
