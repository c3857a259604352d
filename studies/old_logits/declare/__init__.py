"""What a study declares before it runs: its recipe, its methods, its regimes and its pilot."""
