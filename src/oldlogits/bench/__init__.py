"""What ``oldlogits bench`` runs."""
