"""Versions on disk: a crash-safe log, its records, and the owner of its folder."""
