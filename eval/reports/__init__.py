"""Tables, plots and statistics made from results."""
