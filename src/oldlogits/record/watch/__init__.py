"""Run folders in a browser while they grow: a list of the runs side by side, the report of each, its newest episodes."""
