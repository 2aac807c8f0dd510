"""What do people see? Pages, plots and tables."""
