"""What a caller says about configurations, and how it travels: as objects, as JSON text."""
