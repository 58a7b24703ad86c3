"""Training methods, one file each: the file's name is the value of ``distillation_method``."""
