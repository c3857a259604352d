"""What the cells of a study compute: learning runs, decision errors on recorded traces, the cost of each route."""
