"""What trained runs and their data show: figures, router views, the report page."""
