"""Inference servers over HTTP as one `RolloutEngine`: client, pool, health and launch."""
