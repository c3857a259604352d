"""What a recipe says of the objective beyond single keys: the knobs of losses, and the presets of other projects."""
