"""The trainer's model, its tokenizer and chat format, and the scorer."""
