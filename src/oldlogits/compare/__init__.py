"""What `oldlogits compare` does: recipes under the same seeds, over processes, and one table of what came out."""
