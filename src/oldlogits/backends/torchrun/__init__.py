"""A trainer that is sharded over the ranks of torchrun."""
