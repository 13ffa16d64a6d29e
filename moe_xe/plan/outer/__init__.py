"""The weights' gradient: what it is compiled for, its configurations, and the choice among them."""
