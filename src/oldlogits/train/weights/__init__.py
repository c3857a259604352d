"""The weights that a trainer holds: the live ones, stored versions, their average, and the engine's view of them."""
