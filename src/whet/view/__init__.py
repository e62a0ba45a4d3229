"""Building blocks of HTML reports: plots and a page template. Callers supply the data."""
