"""The backends that supply engine, trainer and clock to the loop: lockstep, local, Ray and torchrun."""
