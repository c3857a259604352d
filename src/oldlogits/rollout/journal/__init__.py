"""The journal of rollouts: what groups in flight have sampled, on disk as it grows, so that a killed run goes on with it."""
