"""The report of runs, as HTML and as Markdown."""
