"""Studies that are made with the product; no part of the wheel."""
