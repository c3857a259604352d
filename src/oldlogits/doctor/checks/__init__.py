"""One small function a check: loss tokens in, a verdict with its evidence out. `listed` names them all."""
