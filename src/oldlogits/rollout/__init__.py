"""Engines that sample, and the turns between agent and environment."""
