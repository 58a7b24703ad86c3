"""What a run gives away: weights that other programs load, and the card that says how."""
