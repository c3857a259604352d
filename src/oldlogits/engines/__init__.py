"""Engines that sample: the embedded one, servers over HTTP, and the server that `oldlogits serve` runs."""
