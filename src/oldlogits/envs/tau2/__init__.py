"""The shape of tau2-bench: a customer with a scenario, an agent with a policy and tools, a database that is compared with gold's."""
