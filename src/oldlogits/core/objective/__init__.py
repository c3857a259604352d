"""What a recipe says of an objective beside its variant: the correction of r_d, and the losses with their own knobs."""
