"""One file per route to the old logits."""
