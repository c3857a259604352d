"""What a user adds from outside of the package, each in one file, and runs that use it."""
