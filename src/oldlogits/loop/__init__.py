"""The one training loop, and the checks that it makes while it runs."""
