"""The order desk: an environment, its data, its scripted clerks, and models that begin there."""
