"""The documentation site: pages that are written from the source, the others as they stand, and one strict build.

python -m tools.site              # build/site, and no warning
python -m tools.site page errors  # one of the written pages, on standard output
"""
