"""The embedded default: a tiny SDXL and a generator of captioned pictures, so that a first run needs no download."""
