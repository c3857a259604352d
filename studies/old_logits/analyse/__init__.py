"""What the results say: intervals and tests, paired contrasts, pooled decision errors."""
