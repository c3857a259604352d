"""Trajectories per second of k rollout workers, where what takes time is the environments."""
