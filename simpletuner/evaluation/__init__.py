"""How good a few-step model is, as numbers: its pictures are judged beside those of the model that it was made from."""
