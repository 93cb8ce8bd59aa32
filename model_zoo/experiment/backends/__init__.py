"""Where a grid's runs run: processes of this machine, or of a Ray cluster."""
