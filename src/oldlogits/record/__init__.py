"""Events, tables, the run folder and the report."""
