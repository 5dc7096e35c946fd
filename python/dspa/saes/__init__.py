"""Sparse autoencoders: frozen ones, their file formats, training, quality and labels."""
