"""Exact metrics: integer counts and float64 sums, added over ranks, divided once. Imports nothing from launch."""
