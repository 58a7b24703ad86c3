"""Model families: one file each, whose name is the value of ``model_family``; what a file must offer is in _base.py."""
