"""The output head: logits as a family forms them, log-probs of given tokens, and the library that may compute them on a GPU."""
