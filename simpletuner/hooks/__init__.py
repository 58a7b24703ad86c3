"""Hooks: small stateful dataclasses that the trainer calls at the start, after each step and at the end."""
