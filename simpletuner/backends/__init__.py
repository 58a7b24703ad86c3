"""Where datasets' files are: one file a kind of place, its name is the dataset's ``type``."""
