"""The ground floor: errors, files, settings, processes and progress. Knows nothing of models or data."""
