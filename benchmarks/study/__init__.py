"""The study: does the method help? Runs, results and their page."""
