"""Measurements of the product, and predictions for clusters; no part of the wheel. README.md says what each measures."""
