"""What `report.py` is made of: reading run folders, the rows of the paper's tables, and the two
forms of the page."""
