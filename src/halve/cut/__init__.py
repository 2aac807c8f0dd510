"""What goes, and what becomes of the rest? The files beside the rooms alone know the order of the rooms."""
