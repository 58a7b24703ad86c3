"""Turns a command line of diffusers' latent consistency scripts into the two files of a run."""
