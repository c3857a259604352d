"""The gateway: agent programs talk to the run's engine through the chat interfaces that they know, token by token exact."""
