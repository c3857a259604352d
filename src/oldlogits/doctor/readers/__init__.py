"""One file a kind of dump: each makes a token table of what a framework has written."""
