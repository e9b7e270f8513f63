"""The report: run folders and the rows of the paper's tables, as a page and as Markdown."""
