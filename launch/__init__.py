"""Programs: training, the command line, data preparation and reports."""
