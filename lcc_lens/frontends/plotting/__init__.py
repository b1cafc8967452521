"""Plotting: turns results into Plotly figures with one style, units, sample sizes and seeds; runs no model."""
