"""Training again from recorded batches: without sampling, under the recorded recipe or under another one (docs/replay.md)."""
