"""Plotting: data in, Plotly figure out; no model is run. One look, fixed colours, units, sample sizes and seeds."""
