"""The chat interfaces that agent programs speak: chat completions, responses, and Anthropic's messages; one file each."""
