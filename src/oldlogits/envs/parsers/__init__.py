"""Parsers of tool calls, one a file."""
