"""An agent program over the openai client; the package is here only so that a recipe can name it."""
