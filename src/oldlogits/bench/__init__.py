"""What `oldlogits bench versions` measures: the cost of keeping exact versions, on a random model or on yours."""
