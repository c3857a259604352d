"""The journal of rollouts: what every group in flight has sampled, on disk as it grows, so that a killed run goes on with it."""
