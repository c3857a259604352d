"""The built-in losses, one file each; they enter a run through `LOSSES` of core/loss.py, as losses from outside do."""
