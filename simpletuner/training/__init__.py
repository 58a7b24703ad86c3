"""Training: the loop, its state, and what is written so that a run can go on."""
