"""What each kind of inference server needs beyond HTTP."""
