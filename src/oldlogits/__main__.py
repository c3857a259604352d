"""``python -m oldlogits``: the command line."""

from oldlogits.cli.main import main

if __name__ == "__main__":
    main()
