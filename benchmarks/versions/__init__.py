"""What exact versions cost, held to bars, against a copy, an average and what others send: the tables of docs/versions.md."""
