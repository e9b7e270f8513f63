"""Reads images from files, augments them and collates them into batches of pixels."""
