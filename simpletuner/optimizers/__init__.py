"""Optimizers: one file is one plug-in (see ``_base.py``)."""
