"""tau2-bench: a customer with a scenario, an agent with a policy and tools, and databases that are compared with gold's."""
