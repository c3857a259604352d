"""Model families: what trainer, chat format, checkpoints and engines make of a small random model of each.

    python -m benchmarks.families [--only NAME ...] [--vllm PYTHON] [--write docs/models.md]

shapes.py, chats.py: the models' configs, and the shapes of their chat templates -> folders.py: a folder as users bring it
-> checks.py: figures against transformers' own forward pass -> __main__.py: the table
"""
