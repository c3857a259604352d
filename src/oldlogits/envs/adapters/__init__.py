"""Adapters: what makes environments of classes that were written for another project, one a file."""
