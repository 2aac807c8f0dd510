"""An open model: how it is read and written, how good and how fast it is."""
