"""The backend "ray": actors of a Ray cluster."""
