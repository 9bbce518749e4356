"""Stores that machines share: one suite over all kinds, on real servers, and what each does when they are bad."""
